"""Objectives: pure losses that compare a student's answer with a teacher."""

from pitools.objectives.imitation import Imitation as Imitation
from pitools.objectives.imitation import imitation_loss as imitation_loss
