"""Distances between sets of points or features, diversity, and what becomes of the modes of a mixture."""

from pitools.metrics.features import Moments as Moments
from pitools.metrics.features import class_diversity as class_diversity
from pitools.metrics.features import frechet_distance as frechet_distance
from pitools.metrics.features import pairwise_diversity as pairwise_diversity
from pitools.metrics.gathered import FeatureSet as FeatureSet
from pitools.metrics.kernel import KernelDistance as KernelDistance
from pitools.metrics.kernel import kernel_distance as kernel_distance
from pitools.metrics.neighbours import DensityCoverage as DensityCoverage
from pitools.metrics.neighbours import PrecisionRecall as PrecisionRecall
from pitools.metrics.neighbours import density_coverage as density_coverage
from pitools.metrics.neighbours import precision_recall as precision_recall
from pitools.metrics.patches import patches as patches
from pitools.metrics.points import ModeReport as ModeReport
from pitools.metrics.points import diversity as diversity
from pitools.metrics.points import endpoint_rmse as endpoint_rmse
from pitools.metrics.points import energy_distance as energy_distance
from pitools.metrics.points import mode_report as mode_report
from pitools.metrics.points import same_mode_rate as same_mode_rate
from pitools.metrics.points import sliced_wasserstein as sliced_wasserstein
from pitools.metrics.scores import InceptionScore as InceptionScore
from pitools.metrics.scores import inception_score as inception_score
