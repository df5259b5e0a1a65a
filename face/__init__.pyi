from diptych import engine as engine
from diptych import handlers as handlers
from diptych import losses as losses
from diptych import recipes as recipes
from diptych.engine import *
from diptych.handlers import *
from diptych.losses import *
from diptych.version import __version__ as __version__
