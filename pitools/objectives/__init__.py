"""Objectives: pure losses that compare a student's answer with a teacher, and a teacher's with data."""

from pitools.objectives.flow_matching import flow_matching_loss as flow_matching_loss
from pitools.objectives.imitation import Imitation as Imitation
from pitools.objectives.imitation import imitation_loss as imitation_loss
from pitools.objectives.mixing import Intervals as Intervals
from pitools.objectives.mixing import mixed_intervals as mixed_intervals
from pitools.objectives.mixing import teacher_ratio as teacher_ratio
from pitools.objectives.pi_id import PiID as PiID
from pitools.objectives.pi_id import SegmentLoss as SegmentLoss
from pitools.objectives.pi_id import draw_segments as draw_segments
from pitools.objectives.pi_id import segment_losses as segment_losses
