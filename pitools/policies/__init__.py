"""Policies: closed-form velocity fields on `[B, L, C]`, one file each, with the head that reads them."""

from pitools.policies.dx import DXHead as DXHead
from pitools.policies.dx import DXPolicy as DXPolicy
from pitools.policies.flow_map import FlowMapStudent as FlowMapStudent
from pitools.policies.flow_map import NetworkFlowMap as NetworkFlowMap
from pitools.policies.gm import GMHead as GMHead
from pitools.policies.gm import GMPolicy as GMPolicy
from pitools.policies.head import Head as Head
from pitools.policies.head import HeadSizes as HeadSizes
from pitools.policies.head import Outputs as Outputs
from pitools.policies.head import Segment as Segment
from pitools.policies.polynomial import PolynomialHead as PolynomialHead
from pitools.policies.polynomial import PolynomialPolicy as PolynomialPolicy
from pitools.policies.shortcut import ShortcutHead as ShortcutHead
from pitools.policies.shortcut import ShortcutPolicy as ShortcutPolicy
from pitools.policies.static import StaticNetwork as StaticNetwork
from pitools.policies.student import NetworkStudent as NetworkStudent
from pitools.policies.student import PolicyNetwork as PolicyNetwork
