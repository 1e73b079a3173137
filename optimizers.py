"""Which optimizer moves which parameter: Muon the matrices between hidden layers, AdamW the rest, each part by itself.

Muon: https://kellerjordan.github.io/posts/muon/
"""
import torch


def make_optimizers(config, model, muon_class=torch.optim.Muon):
    """{part: [Muon, AdamW]} for the trunk and each head: nothing is shared, so no part moves another."""
    optimizers = {}
    recurrent = {p for module in model.modules() if isinstance(module, torch.nn.GRU) for p in module.parameters()}
    for part, params in model.parts().items():
        # Muon orthogonalises the update of a matrix between hidden layers
        matrices = [p for p in params if p.dim() == 2 and min(p.shape) > 1
                    and p is not model.wte.weight and p not in recurrent]
        others = [p for p in params if not any(p is m for m in matrices)]
        muon = muon_class(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)
        adam = torch.optim.AdamW(others, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0)
        optimizers[part] = [muon, adam]
    return optimizers
