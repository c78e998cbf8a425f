from .harness.claims import Claim as Claim
from .harness.claims import beats as beats
from .harness.claims import holds as holds
from .harness.claims import matches as matches
from .harness.runner import run as run
from .harness.study import Study as Study
from .harness.trial import Trial as Trial

__version__: str
