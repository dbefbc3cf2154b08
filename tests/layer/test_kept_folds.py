"""What inference keeps of a layer's folded kernels: it serves while no parameter has changed, by whatever way."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from pyramid_testing import assert_matches, assert_same_bits, shake
from torch import Tensor, nn

from ept import EPTConfig, EPTLinear, TaskTable
from ept_kernels import Kept
from ept_kernels.backends import cpu as cpu_backend

missing = cpu_backend.unsupported(torch.device("cpu"), torch.float32)
needs_native = pytest.mark.skipif(missing is not None, reason=f"nothing is kept without native code: {missing}")

TASKS = 4
X = torch.randn(8, 11, generator=torch.Generator().manual_seed(0))
MIXED = torch.tensor([3, 0, 1, 2, 2, 1, 3, 0])
#: A task for the batch (by id and as a tensor), fewer samples than tasks, and more.
TASK_IDS: dict[str, object] = {
    "one": 2,
    "scalar": torch.tensor(2),
    "few": torch.tensor([2, 1]),
    "int32": torch.tensor([2, 1], dtype=torch.int32),
    "many": MIXED,
}


def call_with(task_ids: object) -> Callable[[EPTLinear], Tensor]:
    rows = 2 if isinstance(task_ids, Tensor) and len(task_ids.shape) and len(task_ids) == 2 else len(X)
    return lambda layer: layer(X[:rows].to(layer.weight.dtype), task_ids)


CALLS = {name: call_with(task_ids) for name, task_ids in TASK_IDS.items()}


def make_layer(**changes: object) -> EPTLinear:
    torch.manual_seed(0)
    settings = {"r": 3, "kernel_sizes": (2, 3, 2, 4), "num_tasks": TASKS, "task_embedding_dim": 6, **changes}
    with torch.inference_mode(False):
        return shake(EPTLinear(11, 7, config=EPTConfig(**settings))).eval()


def fresh(layer: EPTLinear, call: Callable[[EPTLinear], Tensor]) -> Tensor:
    """The output of a copy, which has kept nothing."""
    return call(copy.deepcopy(layer))


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"], autouse=True)
def without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


def optimizer_step(layer: EPTLinear) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
        layer(X.clone(), MIXED.clone()).square().sum().backward()
        optimizer.step()


def load(layer: EPTLinear, **options: bool) -> None:
    torch.manual_seed(1)
    layer.load_state_dict({name: torch.randn_like(tensor) for name, tensor in layer.state_dict().items()}, **options)


def set_data(layer: EPTLinear) -> None:
    for parameter in (layer.gate, layer.task_table.weight, *layer.kernels):
        parameter.data = torch.randn_like(parameter.data)


def reuse_storage(layer: EPTLinear) -> None:
    kernel = layer.kernels[3]
    kernel.data = kernel.data.T


def edit_numpy(layer: EPTLinear) -> None:
    layer.kernels[2].data.numpy()[0] += 5


def edit_of(find: Callable[[EPTLinear], Tensor]) -> Callable[[EPTLinear], None]:
    def edit(layer: EPTLinear) -> None:
        find(layer).data.mul_(-1.5)

    return edit


def replace_kernel(layer: EPTLinear) -> None:
    layer.kernels[1] = nn.Parameter(torch.full((3, 3), 2.0))


def replace_gate(layer: EPTLinear) -> None:
    layer.gate = nn.Parameter(torch.randn_like(layer.gate))


def grow_table(layer: EPTLinear) -> None:
    table = layer.task_table
    table.weight = nn.Parameter(torch.randn(TASKS + 1, table.dim))
    table.num_tasks += 1


def change(name: str, value: object) -> Callable[[EPTLinear], None]:
    return lambda layer: setattr(layer, name, value)


CHANGES: dict[str, Callable[[EPTLinear], None]] = {
    "optimizer.step": optimizer_step,
    "load_state_dict": load,
    "load_state_dict(assign=True)": lambda layer: load(layer, assign=True),
    "reset_parameters": lambda layer: shake(layer, 3),
    "in place": lambda layer: layer.gate.neg_(),
    "gate.data in place": edit_of(lambda layer: layer.gate),
    "kernel.data in place": edit_of(lambda layer: layer.kernels[0]),
    "every kernel.data": lambda layer: [edit_of(lambda _, k=k: k)(layer) for k in layer.kernels] and None,
    "table.data in place": edit_of(lambda layer: layer.task_table.weight),
    "a task's embedding": edit_of(lambda layer: layer.task_table.weight[2]),
    "data replaced": set_data,
    "a view of the same storage": reuse_storage,
    "numpy": edit_numpy,
    "kernel replaced": replace_kernel,
    "gate replaced": replace_gate,
    "table grown": grow_table,
    "double": lambda layer: layer.double() and None,
    "double and back": lambda layer: shake(layer.double(), 5).float() and None,
    "scaling": change("scaling", 0.5),
    "top_k": change("top_k", 3),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("call", ["one", "few", "many"])
def test_a_change_is_seen_by_the_next_call(call: str, name: str) -> None:
    layer, run = make_layer(), CALLS[call]
    before = run(layer)
    for _ in range(2):
        assert_same_bits(run(layer), before)
    for _ in range(2):  # the second time from what was kept since the first
        CHANGES[name](layer)
        for _ in range(2):
            assert_same_bits(run(layer), fresh(layer, run))


def test_a_change_of_values_changes_the_output() -> None:
    """Otherwise the test above would show nothing."""
    for name in set(CHANGES) - {"double"}:
        layer = make_layer()
        before = [call(layer) for call in CALLS.values()]
        CHANGES[name](layer)
        after = [call(layer) for call in CALLS.values()]
        assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)), name


@pytest.mark.parametrize("call", CALLS)
def test_it_is_what_training_computes(call: str) -> None:
    layer = make_layer()
    kept = [CALLS[call](layer) for _ in range(2)]
    with torch.inference_mode(False), torch.enable_grad():
        trained = CALLS[call](copy.deepcopy(layer))
    for output in kept:
        assert_matches(output, trained.detach(), 1e-6)


@needs_native
@pytest.mark.parametrize("call", CALLS)
def test_a_second_call_folds_nothing(call: str) -> None:
    layer = make_layer()
    CALLS[call](layer)
    value = layer.kept.value
    assert value is not None
    CALLS[call](layer)
    assert layer.kept.value is value
    layer.task_table.weight.data[0] *= 2  # of a task that one and few do not ask for
    CALLS[call](layer)
    assert (layer.kept.value is value) == (call != "many")


def test_training_and_gradients_keep_nothing() -> None:
    layer = make_layer()
    layer.train()
    CALLS["many"](layer)
    layer.eval()
    with torch.inference_mode(False), torch.enable_grad():
        CALLS["many"](layer).sum().backward()
    assert layer.kept.value is None
    assert layer.gate.grad is not None


def test_a_call_with_gradients_has_them_although_a_fold_is_kept() -> None:
    layer = make_layer()
    CALLS["many"](layer)
    with torch.inference_mode(False), torch.enable_grad():
        layer(X.clone(), MIXED.clone()).square().sum().backward()
    assert all(p.grad is not None for p in (layer.gate, layer.task_table.weight, *layer.kernels))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_start_without_it(clone: Callable[[EPTLinear], EPTLinear]) -> None:
    layer = make_layer()
    CALLS["many"](layer)
    twin = clone(layer)
    assert twin.kept.value is None
    assert twin.task_table.kept.value is None
    assert isinstance(twin.kept, Kept)
    edit_of(lambda layer: layer.gate)(twin)
    assert_same_bits(CALLS["many"](layer), fresh(layer, CALLS["many"]))
    assert_same_bits(CALLS["many"](twin), fresh(twin, CALLS["many"]))


def test_it_is_not_saved() -> None:
    layer = make_layer()
    names = list(layer.state_dict())
    CALLS["many"](layer)
    assert list(layer.state_dict()) == names


@needs_native
def test_layers_share_one_copy_of_their_table() -> None:
    table = TaskTable(TASKS, 6)
    config = EPTConfig(kernel_sizes=(2, 3), num_tasks=TASKS, task_embedding_dim=6)
    layers = [EPTLinear(11, 7, config=config, task_table=table).eval() for _ in range(2)]
    for layer in layers:
        layer(X, MIXED)
    assert layers[0].kept.value.mark.table is layers[1].kept.value.mark.table


def test_very_many_tasks_are_not_kept() -> None:
    layer = make_layer(num_tasks=257)
    output = layer(X, 256)
    assert layer.kept.value is None
    assert_same_bits(output, layer(X, 256))


def test_another_backend_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer()
    native_output = CALLS["many"](layer)
    layer.kept.value = None
    monkeypatch.setenv("EPT_BACKEND", "torch")
    assert_matches(CALLS["many"](layer), native_output, 1e-5)
    assert layer.kept.value is None


def test_parameters_made_in_inference_mode() -> None:
    """They have no version counter."""
    with torch.inference_mode():
        layer = EPTLinear(11, 7, config=EPTConfig(kernel_sizes=(2, 3), num_tasks=TASKS)).eval()
        shake(layer)
        for _ in range(2):
            assert_same_bits(CALLS["many"](layer), fresh(layer, CALLS["many"]))
        layer.gate.mul_(-1)
        assert_same_bits(CALLS["many"](layer), fresh(layer, CALLS["many"]))


def test_eight_threads_with_their_own_tasks_get_what_they_would_get_alone() -> None:
    layer = make_layer(num_tasks=8)
    batches = [torch.randperm(8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [layer(X, ids) for ids in batches]
    layer.kept.value = None
    start, wrong = threading.Barrier(8, timeout=60), []

    def work(number: int) -> None:
        start.wait()
        with torch.no_grad():
            for turn in range(50):
                if turn % 10 == number % 10:
                    layer.kept.value = None  # others find nothing kept in the middle of their calls
                if not torch.equal(layer(X, batches[number]), expected[number]):
                    wrong.append((number, turn))
                if not torch.equal(layer(X, number), layer(X, torch.full((8,), number))):
                    wrong.append((number, turn))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_compiled_layer_computes_from_the_parameters_it_has() -> None:
    layer = make_layer()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_matches(compiled(X, MIXED), CALLS["many"](layer), 1e-5)
        edit_of(lambda layer: layer.kernels[0])(layer)
        edit_of(lambda layer: layer.gate)(layer)
