"""All that an engine has for constraints: the gate before the scheduler and the masks beside the worker."""

from __future__ import annotations

from dataclasses import dataclass

from pawl_server.config import EngineSettings
from pawl_server.engine.engine_worker import WorkerFacts
from pawl_server.engine.grammar.compiler import GrammarCompiler, OpenTokenizer
from pawl_server.engine.grammar.gate import GrammarGate
from pawl_server.engine.grammar.masks import MaskBuilder
from pawl_server.engine.grammar.proposer import GrammarProposer
from pawl_server.scheduler.guess import Proposer
from pawl_server.scheduler.ngram import NgramIndex
from pawl_server.scheduler.sequence import SequenceState

__all__ = ["Grammars"]


@dataclass(frozen=True, slots=True)
class Grammars:
    """Where requests wait for their grammar, and what their sequences may choose."""

    gate: GrammarGate
    masks: MaskBuilder

    @classmethod
    def open(cls, settings: EngineSettings, facts: WorkerFacts, open_tokenizer: OpenTokenizer) -> Grammars:
        """As the settings say. The vocabulary is read when the first constraint comes."""
        gate = GrammarGate(
            GrammarCompiler(open_tokenizer),
            num_threads=settings.grammar_threads,
            max_kept=settings.max_grammars,
            max_kept_bytes=settings.max_grammar_bytes,
            timeout_s=settings.grammar_timeout_s,
        )
        return cls(gate, MaskBuilder(facts.vocab_size, facts.eos_token_ids, settings.grammar_threads))

    def make_proposer(self, sequence: SequenceState) -> Proposer:
        """What drafts for a sequence."""
        guesses = NgramIndex()
        return GrammarProposer(self.masks, sequence, guesses) if sequence.constrained else guesses

    async def close(self) -> None:
        """Stop the processes and let the threads go."""
        await self.gate.close()
        self.masks.close()
