"""ODE solvers: they integrate any field f(x, t) and know no policy."""

from pitools.solvers.adaptive import solve_adaptive as solve_adaptive
from pitools.solvers.fixed import Field as Field
from pitools.solvers.fixed import steps as steps
from pitools.solvers.tableaus import SOLVERS as SOLVERS
from pitools.solvers.tableaus import Adaptive as Adaptive
from pitools.solvers.tableaus import RungeKutta as RungeKutta
from pitools.solvers.tableaus import Solver as Solver
from pitools.solvers.tableaus import TwoStep as TwoStep
from pitools.solvers.tableaus import solver as solver
