"""What test authors use: proof that nothing was lost, doubled, reordered or foreign."""

from relay.testing.sequence import Problem, SequenceChecker

__all__ = ["Problem", "SequenceChecker"]
