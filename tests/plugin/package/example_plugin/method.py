"""SimSiam's idea (Chen and He 2021): two views of an image predict each other."""

from torch import nn
from torch.nn.functional import cosine_similarity

from selfsight.methods.base import Method


class Align(Method):
    """Views are predicted from one another; no gradient through what is predicted."""

    n_views = (2, 2)

    def __init__(self, backbone: nn.Module, *, hidden_dim: int = 32) -> None:
        super().__init__(backbone)
        D = backbone.num_features
        self.predictor = nn.Sequential(nn.Linear(D, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, D))

    def training_step(self, batch, batch_idx):
        z1, z2 = (self.backbone(x) for x in batch.views)  # [B, D] each
        p1, p2 = self.predictor(z1), self.predictor(z2)
        similarity = (cosine_similarity(p1, z2.detach()) + cosine_similarity(p2, z1.detach())).mean() / 2
        return {"loss": -similarity, "similarity": similarity.detach()}
