"""Patches: applied and reverted at once, also with other libraries' patches on top."""

from __future__ import annotations

import asyncio
import fractions
import inspect
import pickle
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from mlflow_ctx_autolog import UnsupportedVersionError
from mlflow_ctx_autolog.patching import Patch, Redirect


def greet(name: str, *, mark: str = "!") -> str:
    """Say hello."""
    return f"hello {name}{mark}"


def loud(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    return original(*args, **kwargs).upper()


@pytest.fixture
def library() -> ModuleType:
    module = ModuleType("greetings.core")
    module.greet = greet  # type: ignore[attr-defined]
    return module


class Base:
    def greet(self, name: str) -> str:
        return f"hello {name}"


@pytest.fixture
def child() -> type[Base]:
    return type("Child", (Base,), {})


class OtherLibrary:
    """Patches a function the way others do: saves what it finds, and puts that back."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        self.saved = saved = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: f"<{saved(*args, **kwargs)}>")

    def restore(self) -> None:
        setattr(self.owner, self.name, self.saved)


def test_a_static_method_stays_one() -> None:
    """A static method is called without an object while replaced, and is itself again after."""

    class Greeter:
        greet = staticmethod(greet)

    before = inspect.getattr_static(Greeter, "greet")
    patch = Patch(Greeter, "greet", loud)
    patch.apply()
    assert Greeter.greet("ann") == Greeter().greet("ann") == "HELLO ANN!"
    patch.revert()
    assert inspect.getattr_static(Greeter, "greet") is before
    assert Greeter.greet("ann") == "hello ann!"


def test_applied_patch_replaces_the_function(library: ModuleType) -> None:
    """While the patch is applied, calls go through the replacement with all their arguments."""
    patch = Patch(library, "greet", loud)
    assert not patch.active

    patch.apply()

    assert patch.active
    assert library.greet("you", mark="?") == "HELLO YOU?"


def test_reverted_patch_leaves_nothing(library: ModuleType) -> None:
    """After the patch is reverted, the very same function is in its place."""
    patch = Patch(library, "greet", loud)
    patch.apply()
    patch.revert()

    assert not patch.active
    assert library.greet is greet


def test_patch_can_be_applied_again(library: ModuleType) -> None:
    """A patch can be applied and reverted any number of times."""
    patch = Patch(library, "greet", loud)

    for _ in range(3):
        patch.apply()
        assert library.greet("you") == "HELLO YOU!"
        patch.revert()
        assert library.greet is greet


def test_apply_is_idempotent(library: ModuleType) -> None:
    """Applying a patch repeatedly runs the replacement once a call, and one revert undoes it."""
    calls: list[str] = []

    def counted(original: Callable[..., str], name: str) -> str:
        calls.append(name)
        return original(name)

    patch = Patch(library, "greet", counted)
    for _ in range(3):
        patch.apply()
    library.greet("you")
    patch.revert()

    assert calls == ["you"]
    assert library.greet is greet


def test_revert_is_idempotent(library: ModuleType) -> None:
    """Reverting a patch that is not applied changes nothing."""
    patch = Patch(library, "greet", loud)
    patch.revert()
    assert library.greet is greet

    patch.apply()
    patch.revert()
    patch.revert()
    assert library.greet is greet


def test_apply_from_many_threads_patches_once(library: ModuleType) -> None:
    """Threads that apply the same patch at once leave one layer."""
    calls: list[str] = []

    def counted(original: Callable[..., str], name: str) -> str:
        calls.append(name)
        return original(name)

    patch = Patch(library, "greet", counted)
    together = threading.Barrier(8)

    def apply() -> None:
        together.wait(60)
        patch.apply()

    threads = [threading.Thread(target=apply) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    library.greet("you")
    patch.revert()

    assert calls == ["you"]
    assert library.greet is greet


def test_reference_taken_while_patched_becomes_inert(library: ModuleType) -> None:
    """A reference to the patched function calls the original once the patch is reverted."""
    patch = Patch(library, "greet", loud)
    patch.apply()
    reference = library.greet
    assert reference("you") == "HELLO YOU!"

    patch.revert()

    assert reference("you") == "hello you!"


def test_reference_taken_while_patched_wakes_again(library: ModuleType) -> None:
    """A reference to the patched function is patched again once the patch is applied again."""
    patch = Patch(library, "greet", loud)
    patch.apply()
    reference = library.greet
    patch.revert()

    patch.apply()

    assert reference("you") == "HELLO YOU!"


def test_bound_method_taken_while_patched_becomes_inert(child: type[Base]) -> None:
    """A bound method taken from a patched class calls the original once that is reverted."""
    patch = Patch(child, "greet", loud)
    patch.apply()
    reference = child().greet
    assert reference("you") == "HELLO YOU"

    patch.revert()

    assert reference("you") == "hello you"


def test_method_is_replaced_for_existing_objects() -> None:
    """Objects made before the patch was applied are patched and unpatched, too."""

    class Greeter:
        def greet(self, name: str) -> str:
            return f"hello {name}"

    greeter = Greeter()
    original = vars(Greeter)["greet"]
    patch = Patch(Greeter, "greet", loud)

    patch.apply()
    assert greeter.greet("you") == "HELLO YOU"

    patch.revert()
    assert greeter.greet("you") == "hello you"
    assert vars(Greeter)["greet"] is original


def test_inherited_method_is_inherited_again(child: type[Base]) -> None:
    """A patch of an inherited method leaves the base class alone and no residue in its own."""
    patch = Patch(child, "greet", loud)
    patch.apply()
    assert child().greet("you") == "HELLO YOU"
    assert Base().greet("you") == "hello you"

    patch.revert()

    assert "greet" not in vars(child)
    assert child().greet("you") == "hello you"


def test_revert_leaves_the_layer_of_others(library: ModuleType) -> None:
    """Another library's patch on top stays in place, and the one beneath passes calls through."""
    patch = Patch(library, "greet", loud)
    patch.apply()
    OtherLibrary(library, "greet")
    theirs = library.greet
    assert library.greet("you") == "<HELLO YOU!>"

    patch.revert()

    assert library.greet is theirs
    assert library.greet("you") == "<hello you!>"


def test_reapplied_above_the_layer_of_others_runs_once(library: ModuleType) -> None:
    """Applied again after it was buried, the replacement runs exactly once a call."""
    calls: list[str] = []

    def counted(original: Callable[..., str], name: str) -> str:
        calls.append(name)
        return original(name)

    patch = Patch(library, "greet", counted)
    patch.apply()
    OtherLibrary(library, "greet")
    theirs = library.greet

    for round_number in range(1, 4):
        patch.revert()
        assert library.greet("nobody") == "<hello nobody!>"
        patch.apply()
        patch.apply()
        assert library.greet("you") == "<hello you!>"
        assert calls == ["you"] * round_number

    patch.revert()
    assert library.greet is theirs


def test_others_may_leave_first_and_find_the_patch_working(library: ModuleType) -> None:
    """If the other library takes its patch back, ours goes on working, and can still be undone."""
    patch = Patch(library, "greet", loud)
    patch.apply()
    other = OtherLibrary(library, "greet")

    other.restore()
    assert library.greet("you") == "HELLO YOU!"

    patch.revert()
    assert library.greet is greet


def test_others_may_leave_after_revert(library: ModuleType) -> None:
    """If the other library restores our layer after it was reverted, that layer stays inert."""
    patch = Patch(library, "greet", loud)
    patch.apply()
    other = OtherLibrary(library, "greet")
    patch.revert()
    other.restore()
    assert library.greet("you") == "hello you!"

    patch.apply()
    assert library.greet("you") == "HELLO YOU!"

    patch.revert()
    assert library.greet is greet


def test_others_beneath_are_kept(library: ModuleType) -> None:
    """A patch on top of another library's calls theirs, and gives it back when reverted."""
    OtherLibrary(library, "greet")
    theirs = library.greet
    patch = Patch(library, "greet", loud)

    patch.apply()
    assert library.greet("you") == "<HELLO YOU!>"

    patch.revert()
    assert library.greet is theirs


@pytest.mark.parametrize("applied", [True, False])
def test_exceptions_of_the_original_pass_unchanged(applied: bool) -> None:
    """The caller gets the very exception that the original raised, patched or not."""
    failure = KeyError("missing")

    def failing() -> None:
        raise failure

    library = ModuleType("failures")
    library.failing = failing  # type: ignore[attr-defined]
    patch = Patch(library, "failing", lambda original: original())
    patch.apply()
    reference = library.failing
    if not applied:
        patch.revert()

    with pytest.raises(KeyError) as caught:
        reference()

    assert caught.value is failure
    assert caught.value.__context__ is None


def test_patched_function_looks_like_the_original(library: ModuleType) -> None:
    """Name, documentation, module and signature of the function are the same while patched."""
    patch = Patch(library, "greet", loud)
    patch.apply()

    assert library.greet is not greet
    assert library.greet.__name__ == "greet"
    assert library.greet.__doc__ == "Say hello."
    assert library.greet.__module__ == greet.__module__
    assert inspect.signature(library.greet) == inspect.signature(greet)


def test_missing_function_is_named(library: ModuleType) -> None:
    """Where there is nothing to patch, the error names what is missing and who lacks it."""
    patch = Patch(library, "wave", loud)

    with pytest.raises(UnsupportedVersionError, match=r"greetings\.core has no wave") as caught:
        patch.apply()

    assert "this release of greetings" in str(caught.value)
    assert not patch.active
    patch.revert()
    assert not hasattr(library, "wave")


def test_missing_method_is_named(child: type[Base]) -> None:
    """A class without the method is named like a module without the function."""
    with pytest.raises(UnsupportedVersionError, match="Child has no wave"):
        Patch(child, "wave", loud).apply()


def test_async_function_is_awaited_by_the_caller() -> None:
    """A patched async method still gives its caller something to await."""
    calls: list[int] = []

    class Client:
        async def fetch(self, number: int) -> int:
            await asyncio.sleep(0)
            return number * 2

    def counted(original: Callable[..., Any], client: Client, number: int) -> Any:
        calls.append(number)
        return original(client, number + 1)

    patch = Patch(Client, "fetch", counted)
    patch.apply()
    assert asyncio.run(Client().fetch(20)) == 42
    assert calls == [20]

    patch.revert()
    assert asyncio.run(Client().fetch(20)) == 40
    assert calls == [20]


@pytest.fixture
def patched_fraction() -> Iterator[Patch]:
    patch = Patch(fractions.Fraction, "limit_denominator", lambda original, *args: original(*args))
    patch.apply()
    yield patch
    patch.revert()


def test_patched_function_pickles_by_reference(patched_fraction: Patch) -> None:
    """Spark can ship a patched method: it is pickled by its name, like the original."""
    patched = fractions.Fraction.limit_denominator
    pickled = pickle.dumps(patched)
    assert pickle.loads(pickled) is patched

    patched_fraction.revert()

    original = pickle.loads(pickled)
    assert original is fractions.Fraction.limit_denominator
    assert original is not patched


def test_objects_of_a_patched_class_can_be_pickled(patched_fraction: Patch) -> None:
    """Objects of a patched class, and the class itself, survive pickling."""
    assert pickle.loads(pickle.dumps(fractions.Fraction(1, 3))) == fractions.Fraction(1, 3)
    assert pickle.loads(pickle.dumps(fractions.Fraction)) is fractions.Fraction


class Holder:
    """Holds a function, which its method and its property run."""

    def __init__(self, function: Callable[[], str]) -> None:
        self.function = function

    def run(self, mark: str = "") -> str:
        return self.function() + mark

    def __call__(self) -> str:
        return self.run()

    @property
    def made(self) -> str:
        """What the function makes."""
        return self.function()

    @made.setter
    def made(self, function: Callable[[], str]) -> None:
        self.function = function


class Heir(Holder):
    pass


def failing() -> str:
    raise ValueError("the user's")


RUNS = {
    "run": lambda holder: holder.run(),
    "__call__": lambda holder: holder(),
    "made": lambda holder: holder.made,
}


@pytest.mark.parametrize("owner", [Holder, Heir])
@pytest.mark.parametrize("name", RUNS)
def test_a_redirected_method_runs_on_another_receiver(owner: type[Holder], name: str) -> None:
    before = dict(vars(owner))
    redirect = Redirect(owner, name, lambda holder: owner(lambda: f"not {holder.function()}"))
    holder = owner(lambda: "this")
    for _ in range(2):
        redirect.apply()
        redirect.apply()
        assert redirect.active
        assert RUNS[name](holder) == "not this"
        redirect.revert()
        redirect.revert()
        assert RUNS[name](holder) == "this"
        assert dict(vars(owner)) == before


@pytest.mark.parametrize("name", RUNS)
def test_no_frame_of_a_redirect_is_in_a_traceback(name: str) -> None:
    """The user reads what they would read without."""
    redirect = Redirect(Holder, name, lambda holder: Holder(failing))
    tracebacks = []
    for holder in (Holder(failing), Holder(lambda: "")):
        with pytest.raises(ValueError, match="the user's") as raised:
            RUNS[name](holder)
        tracebacks.append([entry.name for entry in raised.traceback])
        redirect.apply()
    redirect.revert()
    assert tracebacks[0] == tracebacks[1]


def test_a_redirected_property_is_one_still() -> None:
    redirect = Redirect(Holder, "made", lambda holder: holder)
    redirect.apply()
    try:
        holder = Holder(lambda: "before")
        holder.made = lambda: "after"
        assert holder.made == "after"
        assert Holder.made.__doc__ == "What the function makes."
    finally:
        redirect.revert()


@pytest.mark.parametrize("name", RUNS)
def test_where_no_receiver_can_be_found_it_stays(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    redirect = Redirect(Holder, name, lambda holder: 1 // 0)
    redirect.apply()
    try:
        assert RUNS[name](Holder(lambda: "this")) == "this"
    finally:
        redirect.revert()
    assert f"Holder.{name} runs untraced" in caplog.text


@pytest.mark.parametrize("name", RUNS)
def test_what_lies_on_top_of_a_redirect_stays(name: str) -> None:
    redirect = Redirect(Holder, name, lambda holder: Holder(lambda: "redirected"))
    original = vars(Holder)[name]
    redirect.apply()
    layer = vars(Holder)[name]
    above: Any = (
        property(lambda self: f"above {layer.fget(self)}")
        if isinstance(layer, property)
        else lambda self: f"above {layer.__get__(self)()}"
    )
    setattr(Holder, name, above)
    try:
        assert RUNS[name](Holder(lambda: "this")) == "above redirected"
        redirect.revert()
        assert vars(Holder)[name] is above
        assert RUNS[name](Holder(lambda: "this")) == "above this"
        redirect.apply()
        assert RUNS[name](Holder(lambda: "this")) == "above redirected"
        redirect.revert()
        assert vars(Holder)[name] is above
    finally:
        setattr(Holder, name, original)


def test_a_method_that_is_missing_is_named() -> None:
    with pytest.raises(UnsupportedVersionError, match="Holder has no walk"):
        Redirect(Holder, "walk", lambda holder: holder).apply()
