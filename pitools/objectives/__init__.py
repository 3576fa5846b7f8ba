"""Objectives: pure losses that compare a student's answer with a teacher, and a teacher's with data."""

from pitools.objectives.flow_map import Alignment as Alignment
from pitools.objectives.flow_map import Prediction as Prediction
from pitools.objectives.flow_map import Times as Times
from pitools.objectives.flow_map import correct as correct
from pitools.objectives.flow_map import noising_loss as noising_loss
from pitools.objectives.flow_map import predict as predict
from pitools.objectives.flow_matching import flow_matching_loss as flow_matching_loss
from pitools.objectives.free_flow import FreeFlow as FreeFlow
from pitools.objectives.free_flow import FreeFlowLoss as FreeFlowLoss
from pitools.objectives.free_flow import auxiliary_loss as auxiliary_loss
from pitools.objectives.free_flow import free_flow_loss as free_flow_loss
from pitools.objectives.imitation import Imitation as Imitation
from pitools.objectives.imitation import imitation_loss as imitation_loss
from pitools.objectives.mixing import Intervals as Intervals
from pitools.objectives.mixing import mixed_intervals as mixed_intervals
from pitools.objectives.mixing import teacher_ratio as teacher_ratio
from pitools.objectives.pi_id import PiID as PiID
from pitools.objectives.pi_id import SegmentLoss as SegmentLoss
from pitools.objectives.pi_id import draw_segments as draw_segments
from pitools.objectives.pi_id import segment_losses as segment_losses
from pitools.objectives.rivals import cloning_loss as cloning_loss
from pitools.objectives.rivals import consistency_loss as consistency_loss
from pitools.objectives.rivals import mean_flow_loss as mean_flow_loss
from pitools.objectives.rivals import progressive_loss as progressive_loss
from pitools.objectives.rivals import regression_loss as regression_loss
