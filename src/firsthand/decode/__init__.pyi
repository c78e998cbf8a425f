from .scmoe import SelfContrastLogitsProcessor as SelfContrastLogitsProcessor
from .scmoe import self_contrast as self_contrast
from .scmoe import self_contrast_logits as self_contrast_logits
