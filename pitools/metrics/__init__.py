"""Distances between sets of points or features, diversity, and what becomes of the modes of a mixture."""

from pitools.metrics.features import class_diversity as class_diversity
from pitools.metrics.features import frechet_distance as frechet_distance
from pitools.metrics.points import ModeReport as ModeReport
from pitools.metrics.points import diversity as diversity
from pitools.metrics.points import endpoint_rmse as endpoint_rmse
from pitools.metrics.points import energy_distance as energy_distance
from pitools.metrics.points import mode_report as mode_report
from pitools.metrics.points import same_mode_rate as same_mode_rate
from pitools.metrics.points import sliced_wasserstein as sliced_wasserstein
