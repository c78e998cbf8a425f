from .peri_ln import GradientSpikes as GradientSpikes
from .peri_ln import PeriLN as PeriLN
from .peri_ln import ResidualStats as ResidualStats
from .peri_ln import norm_placement as norm_placement
from .peri_ln import to_output_only as to_output_only
from .peri_ln import to_peri_ln as to_peri_ln
from .peri_ln import to_post_ln as to_post_ln
