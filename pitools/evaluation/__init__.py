"""`pitools evaluate`: how images compare with data or a teacher, by features of a network and by scorers.

    targets --draw or read--> images --extractor--> features, logits --pitools.metrics--> a table, JSON, a page

Extractors and scorers are functions; see `extractors` and `scorers` for those that are shipped, and for how a package
adds its own.
"""

from pitools.evaluation.extractors import Extracted as Extracted
from pitools.evaluation.extractors import Extractor as Extractor
from pitools.evaluation.extractors import load_extractor as load_extractor
from pitools.evaluation.scorers import ImageScorer as ImageScorer
from pitools.evaluation.scorers import load_scorer as load_scorer
