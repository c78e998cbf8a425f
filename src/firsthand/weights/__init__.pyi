from .aquilamoe import depth_map as depth_map
from .aquilamoe import expand_linear as expand_linear
from .aquilamoe import grow_depth as grow_depth
from .aquilamoe import grow_width as grow_width
from .aquilamoe import scale_out as scale_out
from .aquilamoe import scale_up as scale_up
from .aquilamoe import width_map as width_map
