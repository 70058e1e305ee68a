"""A model's weights in two: the matrices for SoftMuon, and the rest."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from s3_megatron.errors import S3Error


def softmuon_groups(model: nn.Module, others: Iterable[str] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Part the parameters that require a gradient into SoftMuon's, and those of an element-wise optimizer (S3).

    SoftMuon gets matrices and stacks of matrices. To the others go embeddings and convolutions, whatever shares its
    weight with an embedding, the output layer where the model knows it (``get_output_embeddings`` of transformers, or
    Megatron's ``is_embedding_or_output_parameter``), and everything of another number of dimensions.

    Args:
        model: before or after ``fully_shard``.
        others: patterns of names (``*`` and ``?``) that go to the others as well: an output layer that the model does
            not know.

    Raises:
        S3Error: a pattern fits no parameter, or no matrix is left.
    """
    names = dict(model.named_parameters())
    patterns = list(others)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise S3Error(f"no parameter of the model is called {pattern!r}; it has {', '.join(list(names)[:8])}, ...")
    kinds = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
    apart = [module for module in model.modules() if isinstance(module, kinds)]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    apart += [] if output is None else [output]
    elementwise = {id(param) for module in apart for param in module.parameters(recurse=False)}
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, param in names.items():
        if param.requires_grad:
            is_other = (
                param.ndim not in (2, 3)
                or id(param) in elementwise
                or getattr(param, "is_embedding_or_output_parameter", False)
                or any(fnmatchcase(name, pattern) for pattern in patterns)
            )
            (rest if is_other else matrices).append(param)
    if not matrices:
        raise S3Error("no matrix of the model is left for SoftMuon: it is for hidden layers; take S3 for all")
    return matrices, rest
