"""Training: what a loop needs that torch does not have. Sees Protocols only."""

from pitools.training.checkpoint import Checkpoint as Checkpoint
from pitools.training.ema import EMA as EMA
from pitools.training.errors import CheckpointError as CheckpointError
from pitools.training.errors import DivergenceError as DivergenceError
from pitools.training.interrupt import Interrupt as Interrupt
from pitools.training.interrupt import graceful_interrupt as graceful_interrupt
from pitools.training.optimiser import Optimiser as Optimiser
from pitools.training.optimiser import build_optimiser as build_optimiser
from pitools.training.optimiser import clip_at as clip_at
from pitools.training.optimiser import learning_rate_at as learning_rate_at
from pitools.training.random import drawing_from as drawing_from
from pitools.training.random import keyed_generator as keyed_generator
from pitools.training.random import sample_generators as sample_generators
