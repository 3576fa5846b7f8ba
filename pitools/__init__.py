"""π-Flow and its neighbours: policies, Gaussian-mixture flow maths, solvers and distillation.

Time runs from t = 1 (noise) to t = 0 (data).
"""

from pitools.expressiveness import InfeasibleError as InfeasibleError
from pitools.expressiveness import Realisation as Realisation
from pitools.expressiveness import mixture_through as mixture_through
from pitools.mixture import GaussianMixture as GaussianMixture
from pitools.objectives import Imitation as Imitation
from pitools.objectives import imitation_loss as imitation_loss
from pitools.path import diffuse as diffuse
from pitools.path import segments as segments
from pitools.path import shift_time as shift_time
from pitools.path import unshift_time as unshift_time
from pitools.policies import DXPolicy as DXPolicy
from pitools.policies import GMPolicy as GMPolicy
from pitools.policies import PolynomialPolicy as PolynomialPolicy
from pitools.policies import ShortcutPolicy as ShortcutPolicy
from pitools.rollout import Trajectory as Trajectory
from pitools.rollout import integrate as integrate
from pitools.rollout import mean_velocity as mean_velocity
from pitools.rollout import trajectory as trajectory
from pitools.sampling import best_of as best_of
from pitools.sampling import sample as sample
from pitools.types import Factorisation as Factorisation
from pitools.types import FlowMap as FlowMap
from pitools.types import Policy as Policy
from pitools.types import Schedule as Schedule
from pitools.types import Student as Student
from pitools.types import VelocityField as VelocityField

__version__ = "0.1.0"
