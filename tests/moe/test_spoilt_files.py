"""Files of plans and profiles, spoilt at random: each is refused by a ValueError that names the file."""

import copy
import itertools

import numpy as np
import pytest
from tables import random_profile

from forerun.moe.files import read, write
from forerun.moe.identity import Identity
from forerun.moe.plan import Plan
from forerun.moe.planning import make_plan
from forerun.moe.profile import Profile

LOAD = {"plan": Plan.load, "profile": Profile.load}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    profile = random_profile(tokens=3000)[0]
    profile.save(folder / "profile")
    make_plan(profile, 4).save(folder / "plan")
    return folder


def assert_refused(load, path, what):
    try:
        load(path)
    except ValueError as error:
        assert path.name in str(error), what
    except Exception as error:
        raise AssertionError(f"{what}: not a ValueError") from error
    else:
        raise AssertionError(f"{what}: a spoilt file was taken")


def spoilt(content, random):
    """The bytes cut, a bit flipped, pieces taken out, doubled or replaced; and how."""
    found = bytearray(content)
    start, end = sorted(random.integers(0, len(content), 2).tolist())
    kind = random.integers(6)
    if kind == 0:
        del found[start:]
    elif kind == 1:
        found[start] ^= 1 << int(random.integers(8))
    elif kind == 2:
        del found[start : end + 1]
    elif kind == 3:
        found[start:start] = found[start : end + 1]
    elif kind == 4:
        found[start : end + 1] = random.bytes(end + 1 - start)
    else:  # in the header, where most can go wrong
        at = int(random.integers(0, min(len(content), 4000)))
        found[at] = int(random.integers(256))
    return bytes(found), f"kind {kind}, from {start} to {end}"


def assert_spoilt_bytes_are_refused(kind, saved, path, rounds, seed):
    """So many files, none of which is the whole one by chance."""
    random, content, refused = np.random.default_rng(seed), (saved / kind).read_bytes(), 0
    while refused < rounds:
        found, how = spoilt(content, random)
        if found == content:
            continue
        path.write_bytes(found)
        assert_refused(LOAD[kind], path, how)
        refused += 1


@pytest.mark.parametrize("kind", LOAD)
def test_spoilt_bytes_are_refused(kind, saved, tmp_path):
    assert_spoilt_bytes_are_refused(kind, saved, tmp_path / "spoilt", 1000, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("kind", LOAD)
def test_many_spoilt_bytes_are_refused(kind, saved, tmp_path):
    assert_spoilt_bytes_are_refused(kind, saved, tmp_path / "spoilt", 3000, seed=1)


# Damage whose hash fits: each changes header and arrays in place, drawing where, and says what it did.
JUNK = (None, True, -1, 7, 1.5, 1 << 70, "", "other", [], [None], [[0]], {}, {"model": 1})
TYPES = (bool, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64)
SUMMED = ("share", "prior")


def drawn(random, among):
    among = list(among)
    return among[random.integers(len(among))]


def junk(random, but):
    return copy.deepcopy(drawn(random, (value for value in JUNK if value != but)))


def one_of(random, array):
    return tuple(int(random.integers(size)) for size in array.shape)


def missing_array(random, header, arrays):
    name = drawn(random, arrays)
    del arrays[name]
    return name


def renamed_array(random, header, arrays):
    name = drawn(random, arrays)
    arrays[drawn(random, (f"{name}s", name.upper(), "layers", "identity", ""))] = arrays.pop(name)
    return name


def wrong_type(random, header, arrays):
    name = drawn(random, arrays)
    kind = drawn(random, (kind for kind in TYPES if arrays[name].dtype != kind))
    with np.errstate(over="ignore"):
        arrays[name] = arrays[name].astype(kind)
    return f"{name} as {kind}"


def wrong_dimensions(random, header, arrays):
    name = drawn(random, arrays)
    array = arrays[name]
    ways = [array[None], array[..., None], array.ravel()[0], *([array.ravel(), array[0]] if array.ndim > 1 else [])]
    arrays[name] = np.array(drawn(random, ways))
    return f"{name} {arrays[name].shape}"


def wrong_length(random, header, arrays):
    name = drawn(random, arrays)
    array = arrays[name]
    axis = int(random.integers(array.ndim))
    kept = np.arange(array.shape[axis])
    ways = (kept[:0], kept[1:], kept[: len(kept) // 2], np.append(kept, kept[-1]), np.append(kept, kept))
    arrays[name] = array.take(drawn(random, ways), axis)
    return f"{name} {array.shape} as {arrays[name].shape}"


def exchanged_arrays(random, header, arrays):
    told = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    one, other = drawn(random, (pair for pair in itertools.permutations(arrays, 2) if told[pair[0]] != told[pair[1]]))
    arrays[one], arrays[other] = arrays[other], arrays[one]
    return f"{one}, {other}"


def not_finite(random, header, arrays):
    name = drawn(random, (name for name in arrays if arrays[name].dtype.kind == "f"))
    arrays[name][one_of(random, arrays[name])] = drawn(random, (np.nan, np.inf, -np.inf))
    return name


def negative(random, header, arrays):
    name = drawn(random, (name for name in arrays if arrays[name].dtype.kind != "u"))
    arrays[name][one_of(random, arrays[name])] = drawn(random, (-1, -7, -100))
    return name


def wrong_rank(random, header, arrays):
    """One of another rank, which then has too many experts, or of one that is not there."""
    at = one_of(random, arrays["rank"])
    arrays["rank"][at] = drawn(random, (rank for rank in (0, 1, 2, 3, 4, 5, 1000, 32767) if rank != arrays["rank"][at]))
    return f"rank {at}"


def rows_not_of_one(random, header, arrays):
    name = drawn(random, SUMMED)
    arrays[name][one_of(random, arrays[name])[:-1]] *= drawn(random, (0, 0.5, 1.1, 2, 1000))
    return name


def not_rising(random, header, arrays):
    name = drawn(random, (name for name in ("tokens", "keys") if name in arrays))
    at = int(random.integers(1, len(arrays[name])))
    arrays[name][at] = arrays[name][drawn(random, (0, at - 1))]
    return f"{name} {at}"


def no_such_key(random, header, arrays):
    keys = arrays["keys"]
    if random.integers(2):
        keys[-1] = drawn(random, (keys[-1] | (3 << 47), (1 << 63) - 1))  # a layer too many
    else:
        keys[random.integers(len(keys))] |= drawn(random, (8, 1 << 14))  # an expert
    return "keys"


def no_count(random, header, arrays):
    arrays["counts"][one_of(random, arrays["counts"])] = 0
    return "counts"


def no_such_path(random, header, arrays):
    name, values = drawn(random, (("path_token", (50, 1 << 31, 1 << 40)), ("path_experts", (8, 100, 32767))))
    arrays[name][one_of(random, arrays[name])] = drawn(random, values)
    return name


def wrong_field(random, header, arrays):
    """Of the header: missing, or of a value that it cannot have."""
    fields = drawn(random, (header, header["identity"]))
    name = drawn(random, (name for name in fields if name != "kind"))
    if random.integers(3):
        fields[name] = junk(random, fields[name])
        return f"{name} {fields[name]!r}"
    del fields[name]
    return name


def wrong_kind(random, header, arrays):
    header["kind"] = drawn(random, (kind for kind in ("plan", "profile", "other", None, 7) if kind != header["kind"]))
    return repr(header["kind"])


def another_model(random, header, arrays):
    """A model that can be, by a hash that fits, which these arrays are not of."""
    model, layers, experts, top_k = (header["identity"][name] for name in ("model", "layers", "experts", "top_k"))
    one = drawn(random, (([*layers, 9], experts), (layers[:-1], experts), (layers, 4), (layers, 7)))
    header["identity"] = Identity(model, tuple(one[0]), one[1], top_k).as_json()
    return header["identity"]


def wrong_report(random, header, arrays):
    reports = header["layers"]
    at = int(random.integers(len(reports)))
    name = drawn(random, reports[at])
    way = random.integers(6)
    if way == 0:
        del reports[at]
    elif way == 1:
        reports.insert(at, reports[at])
    elif way == 2:
        reports[at] = junk(random, reports[at])
    elif way == 3:
        del reports[at][name]
    elif way == 4:
        reports[at][drawn(random, (f"{name}s", ""))] = 0.5
    else:
        reports[at][name] = drawn(random, ("high", "0.5", [], [0.5], {}))
    return f"{at} {name} {way}"


COMMON = (
    missing_array,
    renamed_array,
    wrong_type,
    wrong_dimensions,
    wrong_length,
    exchanged_arrays,
    negative,
    not_rising,
    wrong_field,
    wrong_kind,
    another_model,
)
DAMAGE = {
    "plan": (*COMMON, not_finite, wrong_rank, rows_not_of_one, wrong_report),
    "profile": (*COMMON, no_such_key, no_count, no_such_path),
}


def assert_damage_is_refused(kind, saved, path, rounds, seed):
    random, (header, arrays) = np.random.default_rng(seed), read(saved / kind, kind)
    for number in range(rounds):
        changed = copy.deepcopy(header), copy.deepcopy(arrays)
        damage = drawn(random, DAMAGE[kind])
        what = damage(random, *changed)
        write(path, kind, *changed)
        assert_refused(LOAD[kind], path, f"{number}: {damage.__name__}, {what}")
    write(path, kind, header, arrays)
    LOAD[kind](path)


@pytest.mark.parametrize("kind", LOAD)
def test_damage_is_refused_though_its_hash_fits(kind, saved, tmp_path):
    assert_damage_is_refused(kind, saved, tmp_path / "spoilt", 300, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("kind", LOAD)
def test_much_damage_is_refused_though_its_hash_fits(kind, saved, tmp_path):
    assert_damage_is_refused(kind, saved, tmp_path / "spoilt", 5000, seed=1)
