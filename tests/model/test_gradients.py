"""Gradients: through a state that is carried on, and with activations computed again instead of kept."""

import pytest
import torch

from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.loss import l2wrap_cross_entropy
from rwkv_nb.model.rwkv import RWKV

SIZES = {"n_layer": 3, "n_embd": 64, "vocab_size": 30, "ctx_len": 24, "head_size_a": 16}
ALL = {"pre_ffn": 1, "head_qk": 6, "tiny_att_dim": 5, "tiny_att_layer": 1, "my_pos_emb": 5, "my_testing": "g"}


def model_of(dtype=torch.float32, **changes):
    config = ModelConfig(**(SIZES | changes))
    g = torch.Generator().manual_seed(0)
    weights = {name: x + 0.2 * torch.randn(x.shape, generator=g) for name, x in init_weights(config, seed=0).items()}
    return RWKV(config, {name: x.to(dtype) for name, x in weights.items()})


def batch(T=24):
    ids = torch.randint(0, 30, (2, T + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"n_layer": 1}, ALL], ids=["plain", "one layer", "all options"])
@pytest.mark.parametrize("pieces", [[12, 12], [1, 5, 18]])
def test_a_state_carried_on_carries_the_gradient(options, pieces):
    """The gradient of a text in pieces is that of the whole; with the state detached it is not."""
    model, (idx, targets) = model_of(torch.float64, **options), batch()
    l2wrap_cross_entropy(model(idx)[0], targets).backward()
    whole = gradients(model)

    def in_pieces(detach):
        model.zero_grad()
        state, parts = None, []
        for piece in idx.split(pieces, 1):
            logits, state = model(piece, [s.detach() for s in state] if detach and state else state)
            parts.append(logits)
        l2wrap_cross_entropy(torch.cat(parts, 1), targets).backward()
        return gradients(model)

    for name, x in in_pieces(detach=False).items():
        torch.testing.assert_close(x, whole[name], rtol=1e-9, atol=1e-12, msg=name)
    cut = in_pieces(detach=True)
    assert max(float((cut[name] - whole[name]).abs().max()) for name in cut) > 1e-5


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}, ALL, ALL | {"dropout": 0.3}],
                         ids=["plain", "dropout", "all options", "all with dropout"])  # fmt: skip
def test_recomputed_activations_give_the_same_bits(options):
    results = []
    for grad_cp in (False, True):
        model, (idx, targets) = model_of(**options), batch(16)
        model.grad_cp = grad_cp
        torch.manual_seed(3)
        before, state = model(idx[:, :7])
        after, _ = model(idx[:, 7:], state)
        loss = l2wrap_cross_entropy(torch.cat((before, after), 1), targets)
        loss.backward()
        results.append((loss.detach(), gradients(model), torch.rand(1)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][2], results[1][2])  # the random numbers go on from the same place
    for name, x in results[0][1].items():
        assert torch.equal(x, results[1][1][name]), name


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3}], ids=["plain", "dropout"])
def test_recomputed_activations_under_autocast(options):
    results = []
    for grad_cp in (False, True):
        model, (idx, targets) = model_of(**options), batch()
        model.grad_cp = grad_cp
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            loss = l2wrap_cross_entropy(model(idx)[0], targets)
        loss.backward()
        results.append(gradients(model))
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


def test_recomputing_keeps_only_what_enters_a_block():
    """Bytes that autograd holds between forward and backward, but for the parameters."""
    kept = []
    for n_layer in (3, 6):
        for grad_cp in (False, True):
            model, (idx, targets) = model_of(n_layer=n_layer), batch()
            model.grad_cp = grad_cp
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            sizes = {}

            def pack(x, own=own, sizes=sizes):
                if x.untyped_storage().data_ptr() not in own:
                    sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                loss = l2wrap_cross_entropy(model(idx)[0], targets)
            kept.append(sum(sizes.values()))
            loss.backward()
    plain, checkpointed = (kept[2] - kept[0]) / 3, (kept[3] - kept[1]) / 3  # of one block more
    assert plain > 20 * 2 * 24 * 64 * 4
    assert checkpointed < plain / 5


def test_nothing_is_recomputed_without_gradients():
    model, (idx, _) = model_of(), batch()
    model.grad_cp = True
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(idx)
    assert len(calls) == 1
    model(idx)[0].sum().backward()
    assert len(calls) == 3
