"""A verifier: the language model with a scalar head, which scores answers instead of writing them.

The score of an answer is a linear function of the final hidden state of its last token, the
end-of-turn token, which has seen the prompt and the whole answer. The head is one more parameter,
`score.weight`, beside the transformer's own, so a checkpoint loads with `load_state_dict` as ever.

Source: Stiennon et al. 2020, appendix B: head weights drawn with variance 1 / (d_model + 1).
"""

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.transformer import Transformer

HEAD = {"name": "scalar", "parameter": "score.weight"}
"""What a checkpoint says of the head."""


class Verifier(Transformer):
    """A `Transformer` that can also score."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, kernel: str = "auto"
    ) -> None:
        super().__init__(config, dtype, kernel)
        self.score = nn.Linear(config.d_model, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(config.d_model + 1) ** -0.5)

    def scores(self, hidden: Tensor) -> Tensor:
        """(...,) float32 scores of hidden states (..., C)."""
        return self.score(hidden.float()).squeeze(-1)
