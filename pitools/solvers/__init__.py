"""ODE solvers: they integrate any field f(x, t) and know no policy."""

from pitools.solvers.adaptive import solve_adaptive as solve_adaptive
from pitools.solvers.embedded import Arrival as Arrival
from pitools.solvers.embedded import solve_per_factor as solve_per_factor
from pitools.solvers.exponential import SCALE as SCALE
from pitools.solvers.exponential import Clock as Clock
from pitools.solvers.exponential import Rows as Rows
from pitools.solvers.exponential import exponential_grid as exponential_grid
from pitools.solvers.exponential import exponential_rows as exponential_rows
from pitools.solvers.exponential import follow as follow
from pitools.solvers.exponential import solve_exponential as solve_exponential
from pitools.solvers.fixed import Field as Field
from pitools.solvers.fixed import steps as steps
from pitools.solvers.tableaus import SOLVERS as SOLVERS
from pitools.solvers.tableaus import Adaptive as Adaptive
from pitools.solvers.tableaus import Exponential as Exponential
from pitools.solvers.tableaus import PerFactor as PerFactor
from pitools.solvers.tableaus import RungeKutta as RungeKutta
from pitools.solvers.tableaus import Solver as Solver
from pitools.solvers.tableaus import TwoStep as TwoStep
from pitools.solvers.tableaus import solver as solver
