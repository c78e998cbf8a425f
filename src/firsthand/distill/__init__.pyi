from .soft import soft_distillation_loss as soft_distillation_loss
