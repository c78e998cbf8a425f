from .gistembed import GISTLoss as GISTLoss
from .gistembed import add_guide_embeddings as add_guide_embeddings
from .gistembed import contrastive_loss as contrastive_loss
from .gistembed import gist_loss as gist_loss
from .gistembed import gist_mask as gist_mask
