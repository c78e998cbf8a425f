from .aem import AEM as AEM
from .aem import AttentionEntropy as AttentionEntropy
from .aem import aem_loss as aem_loss
from .aem import aem_weight as aem_weight
from .aem import attention_entropy as attention_entropy
from .mil import AttentionMIL as AttentionMIL
