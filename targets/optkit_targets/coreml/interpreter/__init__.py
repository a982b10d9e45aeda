"""An interpreter of saved Core ML packages, for machines that have no Core ML."""

from optkit_targets.coreml.interpreter.features import Feature, Image
from optkit_targets.coreml.interpreter.interpreter import Interpreter, State, load
from optkit_targets.coreml.interpreter.weights import Weight

__all__ = ["Feature", "Image", "Interpreter", "State", "Weight", "load"]
