"""Finds the hook points, weights and architecture in a transformer's graph that graphlens did not export."""

from __future__ import annotations

from graphlens.surgery.match.apart import with_norms_apart as with_norms_apart
from graphlens.surgery.match.finding import match as match
from graphlens.surgery.match.records import Match as Match
from graphlens.surgery.match.records import MatchedWeight as MatchedWeight
from graphlens.surgery.match.records import Ports as Ports
from graphlens.surgery.match.records import Quantised as Quantised
from graphlens.surgery.match.records import View as View
