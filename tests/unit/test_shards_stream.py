"""`longvila.shards.stream`: who reads what, in which order, and damage that is counted by name."""

from __future__ import annotations

import json
import random

import pytest

from longvila.errors import ConfigError, DataError
from longvila.shards import BadSamples, SourceSample
from longvila.shards.sample import Medium
from longvila.shards.stream import list_shards, mix, shuffle, stream_samples

from .shards_parts import all_kinds, make_loader, packed, rewrite, video, without_indexes


def texts(folder, count=24, max_samples=2):
    samples = (SourceSample(f"text-{index}", [], None, "text", {"text": f"a b{index}"}) for index in range(count))
    return list_shards(packed(folder, samples, max_samples).name, folder.parent)


def stream(shards, epoch=0, reader=0, num_readers=1, seed=0, shuffle_buffer=4, bad=None):
    bad = bad or BadSamples()
    options = {"reader": reader, "num_readers": num_readers, "shuffle_buffer": shuffle_buffer, "bad": bad}
    return [sample.key for sample in stream_samples(shards, seed=seed, epoch=epoch, **options)]


def test_samples_come_back_as_they_were_written(tmp_path):
    written = {sample.key: sample for sample in all_kinds(3, 2, 2)}
    shards = list_shards("data", packed(tmp_path / "data", written.values()).parent)
    read = list(stream_samples(shards, seed=0, epoch=0, reader=0, num_readers=1, shuffle_buffer=3, bad=BadSamples()))
    assert {sample.key for sample in read} == set(written)
    for sample in read:
        source = written[sample.key]
        assert (sample.messages, sample.metadata) == (source.messages, source.metadata)
        assert tuple(medium.data for medium in sample.media) == source.files
        assert [medium.type for medium in sample.media] == [source.media_type] * len(source.files)


def test_readers_share_the_samples_without_overlap(tmp_path):
    shards = texts(tmp_path / "data")
    shares = [stream(shards, reader=reader, num_readers=5) for reader in range(5)]
    assert sorted(key for share in shares for key in share) == sorted(f"text-{index}" for index in range(24))


def test_the_order_is_set_by_seed_and_epoch_alone(tmp_path):
    shards = texts(tmp_path / "data")
    first = stream(shards)
    random.seed(7)  # the global generator has no say
    assert stream(shards) == first
    assert stream(shards, epoch=1) != first
    assert stream(shards, seed=1) != first
    assert sorted(stream(shards, epoch=1)) == sorted(first)


def test_shards_change_hands_from_epoch_to_epoch(tmp_path):
    shards = texts(tmp_path / "data")
    assert set(stream(shards, num_readers=2)) != set(stream(shards, epoch=1, num_readers=2))


def test_rank_variables_of_the_launcher_change_nothing(tmp_path, monkeypatch):
    shards = texts(tmp_path / "data")
    first = stream(shards, num_readers=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert stream(shards, num_readers=2) == first


def test_a_shuffle_buffer_mixes_samples_of_different_shards(tmp_path):
    shards = texts(tmp_path / "data")
    unmixed = stream(shards, shuffle_buffer=0)
    assert all(int(a[5:]) // 2 == int(b[5:]) // 2 for a, b in zip(unmixed[::2], unmixed[1::2], strict=True))
    assert stream(shards, shuffle_buffer=8) != unmixed


def test_a_shuffle_buffer_is_bounded_by_bytes_too(tmp_path, monkeypatch):
    monkeypatch.setattr("longvila.shards.stream.MAX_BUFFER_BYTES", 250)
    held = [0]

    class Counted:
        def __init__(self, key):
            self.key, self.media = key, (Medium("video", bytes(100), None),)

    def source():
        for key in range(20):
            held[0] += 1
            yield Counted(key)

    out = []
    for sample in shuffle(source(), 1000, random.Random(0)):
        out.append(sample.key)
        assert held[0] - len(out) <= 2
    assert sorted(out) == list(range(20))


def test_a_mixture_follows_the_weights_until_every_stream_is_exhausted():
    streams = [iter(["a"] * 1000), iter(["b"] * 1000)]
    drawn = list(mix(streams, [3.0, 1.0], random.Random(0)))
    assert len(drawn) == 2000
    assert 0.70 < drawn[:1000].count("a") / 1000 < 0.80
    streams = [iter(["a"] * 1000), iter(["b"] * 1000)]
    assert list(mix(streams, [3.0, 1.0], random.Random(0))) == drawn


@pytest.mark.parametrize("cut", [0.3, 0.55, 0.8])
def test_a_shard_cut_short_is_counted_by_name_and_the_rest_is_read(tmp_path, cut):
    packed(tmp_path / "data", [video(f"v{index}", number=16 * index) for index in range(6)], max_samples=3)
    shards = list_shards("data", tmp_path)
    data = shards[0].read_bytes()
    size = len(data.rstrip(bytes(1)))  # tars end in zeros
    shards[0].write_bytes(data[: int(size * cut)])
    bad = BadSamples()
    read = stream(shards, bad=bad)
    assert {"v3", "v4", "v5"} <= set(read)
    assert 3 <= len(read) < 6
    assert "cut short" in bad.listed[str(shards[0])]
    assert bad.count == len(bad.listed)


def test_a_shard_cut_between_two_members_is_noticed(tmp_path):
    shards = texts(tmp_path / "data", count=4, max_samples=4)
    shards[0].write_bytes(shards[0].read_bytes()[: 2 * 1024])  # two members of a header and a block each
    bad = BadSamples()
    assert len(stream(shards, bad=bad)) == 2
    assert list(bad.listed) == [str(shards[0])]


def test_what_is_no_tar_is_counted_by_name(tmp_path):
    shards = texts(tmp_path / "data")
    shards[3].write_bytes(b"<html>404</html>" * 100)
    bad = BadSamples()
    assert len(stream(shards, bad=bad)) == 22
    assert list(bad.listed) == [str(shards[3])]


def test_half_samples_are_counted_by_key(tmp_path):
    packed(tmp_path / "data", [video(f"v{index}", number=16 * index) for index in range(4)])
    (shard,) = list_shards("data", tmp_path)
    rewrite(shard, lambda name, data: None if name in ("v1.json", "v2.mp4") else (name, data))
    bad = BadSamples()
    assert sorted(stream([shard], bad=bad)) == ["v0", "v3"]
    assert set(bad.listed) == {"v1", "v2"}
    assert bad.listed["v1"].startswith("media without its JSON")
    assert bad.listed["v2"].startswith("JSON without its video")
    assert str(shard) in bad.listed["v1"]
    assert (bad.read, bad.count) == (4, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{not json", "is not that of a sample"),
        (b"[]", "is not that of a sample"),
        (b'{"messages": []}', "is not that of a sample"),
        (b'{"messages": [], "media_type": "video", "media": null, "metadata": {}}', "no facts about the video"),
        (b'{"messages": [], "media_type": "text", "media": null, "metadata": {}}', "a text sample has media"),
    ],
)
def test_a_broken_json_is_counted_by_key(tmp_path, text, reason):
    packed(tmp_path / "data", [video("v0"), video("v1", number=16)])
    (shard,) = list_shards("data", tmp_path)
    rewrite(shard, lambda name, data: (name, text if name == "v1.json" else data))
    bad = BadSamples()
    assert stream([shard], bad=bad) == ["v0"]
    assert reason in bad.listed["v1"]


def test_a_sample_may_have_no_metadata(tmp_path):
    packed(tmp_path / "data", [video("v0")])
    (shard,) = list_shards("data", tmp_path)

    def without(name, data):
        return name, json.dumps(json.loads(data) | {"metadata": None}).encode() if name == "v0.json" else data

    rewrite(shard, without)
    assert stream([shard]) == ["v0"]


def test_names_with_dots_keep_their_samples_apart(tmp_path):
    packed(tmp_path / "data", [video("v0"), video("v1", number=16)])
    (shard,) = list_shards("data", tmp_path)
    rewrite(shard, lambda name, data: (f"film.part.{name}", data))
    assert sorted(stream([shard])) == ["film.part.v0", "film.part.v1"]


def test_shards_are_named_by_a_folder_or_a_brace_pattern(tmp_path):
    shards = texts(tmp_path / "data", count=6)
    assert list_shards("data/shard-{000000..000001}.tar", tmp_path) == shards[:2]
    assert list_shards(str(tmp_path / "data"), tmp_path / "elsewhere") == shards
    with pytest.raises(ConfigError, match=r"2 of 5 shards of 'data/.*' are missing, first .*shard-000003.tar"):
        list_shards("data/shard-{000000..000004}.tar", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no \.tar shard"):
        list_shards("empty", tmp_path)


def test_too_few_shards_without_an_index_are_refused_with_the_numbers(tmp_path):
    texts(tmp_path / "data", count=6)
    make_loader(tmp_path, num_data_ranks=4)
    without_indexes(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"'data' has 3 shards for 4 data ranks"):
        make_loader(tmp_path, num_data_ranks=4)


def test_too_many_bad_samples_stop_the_run():
    bad = BadSamples(max_bad_share=0.05)
    bad.read = 100
    for index in range(50):
        bad.record(f"early-{index}", "broken")  # not judged before a hundred are read
    bad = BadSamples(max_bad_share=0.05)
    bad.read = 200
    for index in range(10):
        bad.record(f"key-{index}", "broken")
    with pytest.raises(DataError, match=r"11 of 200 samples .* share of 0.05 .* last one: worst: broken"):
        bad.record("worst", "broken")
