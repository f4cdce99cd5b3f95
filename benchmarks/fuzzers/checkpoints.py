"""Files of weights and trainer states: damaged, of other content, made to run code."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from rwkv_nb.inference.engine import load_engine
from rwkv_nb.model.config import ModelConfig
from rwkv_nb.model.initialization import init_weights
from rwkv_nb.model.rwkv import RWKV
from rwkv_nb.model.weights import load_weights
from rwkv_nb.training.checkpoint import load_checkpoint
from rwkv_nb.training.config import TrainConfig
from rwkv_nb.training.files import CheckpointError
from rwkv_nb.training.trainer_state import TrainerState, random_state

from . import Wrong, damaged, demand, refusal

CONFIG = ModelConfig(2, 32, 11, head_size_a=32)
TINY = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1.5], dtype=torch.bfloat16)}


def stored(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def a_state() -> TrainerState:
    weights = {name: x.float() for name, x in init_weights(CONFIG, seed=0).items()}
    moments = {name: {"step": torch.tensor(3.0), "exp_avg": x * 0.1} for name, x in weights.items()}
    ranks = [{"loss_sum": 1.5, "random": random_state()}]
    return TrainerState(0, 3, 3, 0, -1, TrainConfig(accelerator="cpu").flags(), 100, weights, moments, {}, ranks)


def same(a: Any, b: Any) -> bool:
    """Equal, bit by bit, in tensors, dictionaries and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(x, b[k]) for k, x in a.items())
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def read(reader: Callable[[Path], Any], path: Path) -> tuple[Any, str]:
    """(what is read, "") or (None, "refused"); the error must name the file."""
    try:
        return reader(path), ""
    except (CheckpointError, ValueError) as error:
        return None, refusal(error, str(path))


def damaged_files(folder: Path) -> Callable[[Random], str]:
    """Bits flipped, pieces lost, the end cut off: the file is refused, or everything in it is as it was."""
    tiny, weights, state = stored(TINY), init_weights(CONFIG, seed=0), a_state()
    path, model = folder / "rwkv-3.pth", stored(weights)
    whole = state.save(folder / "whole.state").read_bytes()
    truth = dict(vars(state))

    def model_weights(path: Path) -> dict[str, torch.Tensor]:
        return dict(RWKV.from_checkpoint(path, dtype=None).state_dict())

    kinds = [
        (tiny, load_checkpoint, TINY),
        (tiny, load_checkpoint, TINY),
        (tiny, load_weights, TINY),
        (tiny, load_weights, TINY),
        (model, load_checkpoint, weights),
        (model, model_weights, weights),
        (whole, lambda path: dict(vars(TrainerState.load(path))), truth),
    ]

    def case(draw: Random) -> str:
        content, reader, expected = draw.choice(kinds)
        path.write_bytes(damaged(draw, content) if draw.random() < 0.97 else content)
        found, outcome = read(reader, path)
        if outcome:
            demand(path.read_bytes() != content, "a good file is refused")
            return outcome
        demand(same(found, expected), "read, with other content")
        return "right"

    return case


def rezipped(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """The archive with changed members, and checksums that agree with them."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def honest(content: Any, size: int) -> bool:
    """Whether the tensors stay within what the file can hold: no number from anywhere else."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in content.values()}
    inside = all(x.layout is torch.strided and x.device.type == "cpu" for x in content.values())
    return inside and sum(storages.values()) <= size


def other_content(folder: Path) -> Callable[[Random], str]:
    """Whole files that hold something else: wrong shapes, dtypes, names; pickles changed behind the checksum."""
    path, weights = folder / "rwkv-3.pth", init_weights(CONFIG, seed=0)
    tiny = stored(TINY)
    odd = ("text", 3, None, [], {}, 1.5, True, b"bytes", [torch.zeros(2)], {"x": torch.zeros(2)}, (1, 2))

    path.write_bytes(stored(weights))
    load_engine(path, "cpu fp32", "ours")  # builds its kernel, if need be

    def other_tensor(draw: Random, x: torch.Tensor) -> Any:
        return draw.choice(
            (
                lambda: x[..., :-1],
                lambda: x.unsqueeze(0),
                lambda: x.flatten(),
                lambda: x[:0],
                lambda: x.t() if x.dim() == 2 else x[None],
                lambda: torch.cat([x, x]),
                lambda: torch.tensor(1.0),
                lambda: x.to(torch.int64),
                lambda: x.bool(),
                lambda: x.to(torch.complex64),
                lambda: x.to_sparse(),
                lambda: x.to("meta"),
                lambda: draw.choice(odd),
                lambda: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
                lambda: torch.nn.Parameter(x.float()),
            )
        )()

    def of_models(draw: Random) -> str:
        """A model whose file does not fit RWKV is refused; one that is taken can be run."""
        changed: Any = dict(weights)
        for _ in range(draw.randint(1, 2)):
            name, kind = draw.choice(list(changed)), draw.randrange(5)
            if kind == 0 or not isinstance(changed[name], torch.Tensor):
                del changed[name]
            elif kind == 1:
                changed[draw.choice(("blocks.0.att.x_r", "blocks.7.ffn.key.weight", "blocks.x", "", 3, name + "x"))] = (
                    changed[name]
                )
            else:
                changed[name] = other_tensor(draw, changed[name])
        if draw.random() < 0.05:
            changed = draw.choice([*odd, list(changed.values()), {"state_dict": changed}])
        path.write_bytes(stored(changed))
        reader = draw.choice((RWKV.from_checkpoint, lambda path: load_engine(path, "cpu fp32", "ours")))
        model, outcome = read(reader, path)
        if outcome:
            return outcome
        c = model.config
        fits = c == ModelConfig(2, 32, c.vocab_size, head_size_a=32, dim_ffn=c.dim_ffn)
        demand(fits or c.n_layer < 3, f"a model of other sizes is read: {c}")
        with torch.no_grad():
            logits, _ = model(torch.tensor([[1, 2, 3]]), None)
        demand(
            logits.shape == (1, 3, c.vocab_size) and bool(torch.isfinite(logits).all()),
            f"what is read cannot be run: {c}",
        )
        return "right"

    def of_pickles(draw: Random) -> str:
        """The list of contents is damaged and the checksum is right: no number that the file does not have."""
        member = draw.choice(("data.pkl", "data.pkl", "data.pkl", "version", "byteorder"))
        path.write_bytes(rezipped(tiny, lambda name, data: damaged(draw, data) if name.endswith(member) else data))
        found, outcome = read(draw.choice((load_checkpoint, load_weights)), path)
        if not outcome:
            demand(honest(found, 26), f"numbers from nowhere: { {k: x.shape for k, x in found.items()} }")
        return outcome or "right"

    def of_states(draw: Random) -> str:
        """A state with one field changed is refused, or can be put back without an error."""
        content = dict(vars(a_state()))
        name = draw.choice(list(content))
        if draw.random() < 0.3:
            content[name] = draw.choice(odd)
        elif isinstance(content[name], dict) and content[name]:
            key = draw.choice(list(content[name]))
            value = content[name][key]
            content[name][key] = other_tensor(draw, value) if isinstance(value, torch.Tensor) else draw.choice(odd)
        elif name == "ranks":
            part = draw.choice(("python", "numpy", "torch"))
            content["ranks"][0]["random"][part] = draw.choice(odd)
        else:
            del content[name]
        path.write_bytes(stored(content))
        found, outcome = read(TrainerState.load, path)
        if not outcome:
            found.misfit(TrainConfig(accelerator="cpu"), 100)
            found.changed_flags(TrainConfig(accelerator="cpu"))
            found.belongs_to(weights)
        return outcome or "right"

    return lambda draw: draw.choice((of_models, of_models, of_pickles, of_states))(draw)


CALLS = (
    "os.system",
    "posix.system",
    "subprocess.check_call",
    "builtins.exec",
    "builtins.eval",
    "os.mkdir",
    "builtins.open",
    "pathlib.Path.mkdir",
    "torch.hub.load",
    "torch.load",
    "runpy.run_path",
    "numpy.load",
    "importlib.import_module",
    "shutil.copyfile",
    "torch._utils._rebuild_tensor_v2",
    "collections.OrderedDict",
    "pickle.loads",
    "os.remove",
    "webbrowser.open",
    "types.FunctionType",
    "torch.storage._load_from_bytes",
    "nt.system",
    "code.interact",
)


class Call:
    """Unpickled by whoever trusts a file: a call of any function with any arguments."""

    def __init__(self, name: str, *arguments: Any) -> None:
        self.name, self.arguments = name, arguments


class _Pickler(pickle._Pickler):  # the one in Python can be told to write names that are not there
    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, Call):
            return super().save(obj, save_persistent_id)
        module, name = obj.name.rsplit(".", 1)
        self.write(b"c" + f"{module}\n{name}\n".encode())
        super().save(obj.arguments)
        self.write(pickle.REDUCE)
        return None


def pickled(content: Any, protocol: int) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol).dump(content)
    return file.getvalue()


def hostile(folder: Path) -> Callable[[Random], str]:
    """Pickles that call functions which leave a marker: refused, and no marker, however the file is made."""
    path, marker, victim, script = folder / "rwkv-3.pth", folder / "marker", folder / "victim", folder / "run.py"
    tiny = stored(TINY)
    script.write_text(f"open({str(marker)!r}, 'w').close()\n")
    victim.write_text("mine")
    numbers = np.zeros(3)
    state_types = random.Random(0).getstate()

    def arguments(draw: Random) -> tuple:
        mark, code = str(marker), f"open({str(marker)!r}, 'w').close()"
        return draw.choice(
            [
                (f"touch {mark}",),
                (["touch", mark],),
                (code,),
                (mark,),
                (mark, "w"),
                (str(script),),
                (str(victim), mark),
                (str(victim),),
                (numbers,),
                (state_types,),
                (),
                (None,),
            ]
        )

    def case(draw: Random) -> str:
        call = Call(draw.choice(CALLS), *arguments(draw))
        content = draw.choice([call, {"emb.weight": call}, [call], {"a": {"b": (1, call)}}, {call.name: 1, "x": call}])
        attack = pickled(content, draw.choice((0, 1, 2, 2, 2, 3, 4)))
        kind = draw.randrange(4)
        if kind == 0:
            data = rezipped(tiny, lambda name, old: attack if name.endswith("data.pkl") else old)
        elif kind == 1:
            data = rezipped(tiny, lambda name, old: attack + old if name.endswith("data.pkl") else old)
        elif kind == 2:
            data = attack
        else:  # the form of torch before 1.6: magic number, protocol, system, content
            data = (
                pickle.dumps(0x1950A86A20F9469CFC6C, 2)
                + pickle.dumps(1001, 2)
                + pickle.dumps({"little_endian": True}, 2)
                + attack
            )
        path.write_bytes(damaged(draw, data) if draw.random() < 0.1 else data)
        reader = draw.choice((load_checkpoint, load_weights, TrainerState.load, RWKV.from_checkpoint))
        found, outcome = read(reader, path)
        demand(not marker.exists() and victim.read_text() == "mine", f"code was run: {call.name}{call.arguments}")
        if not outcome and call.name == "collections.OrderedDict":  # a dictionary, for want of anything else in it
            return "right"
        if not outcome:
            raise Wrong(f"taken: {type(found).__name__} from {call.name}{call.arguments}")
        return outcome

    def watched(draw: Random) -> str:
        try:
            return case(draw)
        finally:
            if marker.is_dir():
                os.rmdir(marker)
            marker.unlink(missing_ok=True)
            victim.write_text("mine")

    return watched
