"""A causal language model of residual blocks: tokens in, logits of the next token out.

    logits = W_head RMSNorm( blocks( W_embed[tokens] ) ),   W_head = W_embed unless told otherwise.

With "M" blocks alone it is the model of the Mamba papers, and takes the weights of `transformers`'
MambaForCausalLM and Mamba2ForCausalLM; "A" and "F" blocks make a hybrid, and "AFAF" is a transformer with
rotary positions. Text is generated in step mode: the prompt is read once, then each token costs the same
however long the text is, but for attention's cache.

Source: Gu and Dao, Mamba (2023), section 3.4 and the released models; Dao and Gu, Mamba-2 (2024).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from paperback.errors import DataError
from paperback.layers.interface import Cost
from paperback.layers.mamba import language_weights
from paperback.layers.mamba.blocks import NORM_EPS, BlockStack
from paperback.saving import Saved

INIT_STD = 0.02  # of the embedding


class MambaLM(Saved, nn.Module):
    """A causal language model.

    Args:
        vocab: number of tokens, >= 1.
        d_model: width.
        layers: one letter for each block: M Mamba, A attention, F feed-forward; see `BlockStack`.
        num_heads: of attention blocks.
        tie: use the embedding as the output matrix, too.
        **settings: of `Mamba`, in all M blocks: kind, d_state, expand, selective, ...

    Attributes:
        embedding, blocks, norm, head: the parts.

    Raises:
        DataError: if an argument is out of range.
    """

    def __init__(
        self,
        vocab: int,
        d_model: int,
        layers: str = "MM",
        num_heads: int = 4,
        tie: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        if vocab < 1:
            raise DataError(f"vocab is {vocab}; a model has at least one token.")
        if settings.get("scan", "forward") != "forward":
            raise DataError(
                f"scan is {settings['scan']!r}; a language model must not see later tokens: leave scan out."
            )
        self.vocab, self.layers = vocab, layers
        self.embedding = nn.Embedding(vocab, d_model)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        self.blocks = BlockStack(layers, d_model, num_heads, causal=True, **settings)
        self.norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.head = nn.Linear(d_model, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=INIT_STD)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"] | None = None,
        reset: Bool[Tensor, "batch length"] | None = None,
        state: tuple[Any, ...] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Logits of the token after each one.

        Args:
            tokens: integers 0 .. vocab - 1, length >= 1.
            mask: True at real tokens; the logits at others are unspecified.
            reset: True where a document begins, of which nothing before is seen.
            state: what an earlier call returned, to go on from there.
            return_state: also return the state after the last token.

        Returns:
            ``(batch, length, vocab)``; with ``return_state=True`` the pair (logits, state).

        Raises:
            DataError: if tokens or mask do not fit.
        """
        hidden = self.embedding(self._checked(tokens))
        if not return_state:
            return self.head(self.norm(self.blocks(hidden, mask, reset, state)))
        hidden, state = self.blocks(hidden, mask, reset, state, return_state=True)
        return self.head(self.norm(hidden)), state

    def init_state(self, batch: int) -> tuple[Any, ...]:
        """The state before the first token, one entry for each block."""
        return self.blocks.init_state(batch)

    def step(
        self, tokens: Int[Tensor, " batch"], state: tuple[Any, ...]
    ) -> tuple[Float[Tensor, "batch vocab"], tuple[Any, ...]]:
        """Feed one token for each sequence; return the logits of the next, and the state after it."""
        hidden, state = self.blocks.step(self.embedding(tokens), state)
        return self.head(self.norm(hidden)), state

    @torch.no_grad()
    def generate(
        self,
        prompt: Int[Tensor, "batch length"],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: int | None = None,
        mask: Bool[Tensor, "batch length"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue prompts token by token.

        Args:
            prompt: tokens, length >= 1; prompts of unequal length are padded on the left.
            max_new_tokens: most tokens to add, >= 0.
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k: draw among the k likeliest tokens only.
            top_p: draw among the likeliest tokens that together have this probability, in (0, 1].
            stop: a sequence ends with this token; what follows it is filled with it.
            mask: True at real tokens of the prompt.
            generator: of the draws; torch's global one if not given.

        Returns:
            The prompts with what was added, up to ``(batch, length + max_new_tokens)``; shorter when all
            sequences have stopped.

        Raises:
            DataError: if an argument is out of range, or the prompt is not padded on the left.
        """
        _check_sampling(max_new_tokens, temperature, top_k, top_p)
        if mask is not None and not bool(mask[:, -1].all()):
            raise DataError("mask is False at a prompt's last token; pad prompts on the left.")
        if max_new_tokens == 0:
            return prompt
        was_training = self.training
        self.eval()
        try:
            logits, state = self(prompt, mask=mask, return_state=True)
            logits, tokens = logits[:, -1], [prompt]
            done = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)
            for i in range(max_new_tokens):
                chosen = draw(logits, temperature, top_k, top_p, generator)
                if stop is not None:
                    chosen = chosen.masked_fill(done, stop)
                    done |= chosen == stop
                tokens.append(chosen.unsqueeze(1))
                if i + 1 == max_new_tokens or bool(done.all()):
                    break
                logits, state = self.step(chosen, state)
        finally:
            self.train(was_training)
        return torch.cat(tokens, 1)

    def cost(self, length: int) -> Cost:
        """Operations and bytes of one sequence in training: all blocks and the output matrix."""
        d_model = self.embedding.embedding_dim
        element = self.head.weight.element_size()
        head = Cost(2 * length * d_model * self.vocab, length * 2 * d_model * element)
        return self.blocks.cost(length) + head

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load a model that `save_pretrained` wrote, or take one over from `transformers`.

        Args:
            pretrained_model_name_or_path: a folder of ours; or a folder that transformers wrote
                (config.json and safetensors) of a MambaForCausalLM or Mamba2ForCausalLM; or such a model
                itself. transformers need not be installed to read its folder.
            **kwargs: as `Saved.from_pretrained` has them.

        Returns:
            The model, in evaluation mode.

        Raises:
            ArtefactError: if the folder is not whole, or of another kind of model.
        """
        source = pretrained_model_name_or_path
        if isinstance(source, nn.Module):
            config, tensors = language_weights.of_model(source)
        elif language_weights.is_transformers_folder(Path(source)):
            config, tensors = language_weights.of_folder(Path(source))
        else:
            return super().from_pretrained(source, **kwargs)
        with torch.random.fork_rng(devices=[]):
            model = cls(**language_weights.arguments(config))
        language_weights.fill(model, tensors)
        return model.to(kwargs.get("map_location", "cpu")).eval()

    def to_transformers(self) -> nn.Module:
        """The same model as a MambaForCausalLM or Mamba2ForCausalLM of `transformers`.

        Raises:
            NotSupportedError: if it has blocks or settings that those do not have.
            MissingExtraError: if transformers is not installed.
        """
        return language_weights.to_transformers(self)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise DataError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; give integers (batch, length)."
            )
        if tokens.shape[1] == 0:
            raise DataError("tokens have length 0; give at least one token, such as one that begins a text.")
        return tokens


def draw(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Draw a token from each row of logits.

    Args:
        logits: of the next token.
        temperature: they are divided by it; 0 takes the largest.
        top_k: only the k largest count.
        top_p: only the largest count whose probabilities first reach this sum.
        generator: of the draw.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        # A token is left out when those before it have reached the sum already.
        ordered = ordered.masked_fill(probability.cumsum(-1) - probability >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, index, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 0:
        raise DataError(f"max_new_tokens is {max_new_tokens}; it must be at least 0.")
    if temperature < 0:
        raise DataError(f"temperature is {temperature}; it must be at least 0.")
    if top_k is not None and top_k < 1:
        raise DataError(f"top_k is {top_k}; it must be at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise DataError(f"top_p is {top_p}; it must lie in (0, 1].")
