"""Lists, annotations and folders as users have them, with the faults that VGG-SS has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fnac.data.annotations import Annotation, ground_truth, read_annotations
from fnac.data.layout import ClipFolder, list_clips, read_ids
from fnac.data.leakage import LeakageError, check_leakage, refuse_leakage


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_ids_come_from_text_csv_or_json_once_each(tmp_path):
    (tmp_path / "a.txt").write_text("x_000001\n-y_000002\r\n\nx_000001\n")
    (tmp_path / "b.csv").write_text("x_000001,202\n-y_000002,0\n")
    for name in ("c.json", "d.JSON"):
        (tmp_path / name).write_text(
            json.dumps([{"file": n, "class": "c", "bbox": []} for n in ("x_000001", "-y_000002")])
        )
    for name in ("a.txt", "b.csv", "c.json", "d.JSON"):
        assert read_ids(tmp_path / name) == ["x_000001", "-y_000002"]


def test_an_empty_list_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"a\.txt lists no clips"):
        read_ids(tmp_path / "a.txt")


def test_annotations_keep_label_and_boxes_and_ignore_other_fields(tmp_path):
    entry = {"file": "x", "class": "elk bugling", "bbox": [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], "extra": 1}
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    assert read_annotations(tmp_path / "a.json") == {
        "x": Annotation("elk bugling", [(0.1, 0.2, 0.3, 0.4), (0.0, 0.0, 1.0, 1.0)])
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "not valid json"),
        ('{"file": "x"}', "must hold a list of annotations, got dict"),
        ('[{"file": "x", "bbox": []}]', "entry 0: KeyError: 'class'"),
        ('[{"file": "x", "class": "c", "bbox": [[0, 1, 2]]}]', "entry 0: ValueError"),
        ('[{"file": "x", "class": "c", "bbox": [[0, 1, 2, "b"]]}]', "entry 0: ValueError"),
        ('[{"file": "x", "class": "c", "bbox": 3}]', "entry 0: TypeError"),
        (
            '[{"file": "x", "class": "c", "bbox": [[23, 0, 45, 48]]}]',
            r"entry 0: .*box \[23, 0, 45, 48\] should be .* in 0\.\.1, not in pixels in {'file': 'x'",
        ),
        ('[{"file": "x", "class": "c", "bbox": [[0, -0.1, 1, 1]]}]', r"box \[0, -0\.1, 1, 1\] should be"),
        ('[{"file": "x", "class": "c", "bbox": [[0, 0, NaN, 1]]}]', r"box \[0, 0, nan, 1\] should be"),
        ('[{"file": "x", "class": "c", "bbox": [[0.6, 0, 0.2, 1]]}]', r"box \[0\.6, 0, 0\.2, 1\] .* x1 <= x2"),
        ('[{"file":"x","class":"c","bbox":[]}, {"file":"x","class":"c","bbox":[]}]', "entry 1: x is annotated twice"),
    ],
)
def test_faulty_annotations_name_file_and_entry(tmp_path, content, message):
    (tmp_path / "faulty.json").write_text(content)
    with pytest.raises(ValueError, match=rf"faulty\.json.*{message}"):
        read_annotations(tmp_path / "faulty.json")


@pytest.mark.parametrize(
    "box",
    [
        [0.534375, 0.3375, -2.8823037615171176e16, 0.909375],  # overflowed, as twelve boxes of vggss.json
        [0.00625, 0.015625, 0.00625, 0.015625],  # without extent, as six others
        [-0.003, 0, 1.003, 1],  # rounding
    ],
)
def test_faulty_boxes_of_the_official_file_are_read(tmp_path, box):
    (tmp_path / "a.json").write_text(json.dumps([{"file": "x", "class": "c", "bbox": [box]}]))
    assert read_annotations(tmp_path / "a.json")["x"].boxes == [tuple(box)]


def test_the_ground_truth_is_the_union_of_truncated_boxes():
    gt = ground_truth(Annotation("", [(0.0, 0.0, 0.5, 0.25), (0.25, 0.125, 0.749, 0.5)]), size=8)
    expected = torch.zeros(8, 8)
    expected[0:2, 0:4] = 1
    expected[1:4, 2:5] = 1  # 0.749 * 8 = 5.99 is truncated
    assert torch.equal(gt, expected)
    assert ground_truth(Annotation("", [])).shape == (224, 224)


@pytest.mark.parametrize(
    ("box", "area"),
    [
        ((-0.5, -3.0, 0.5, 2.0), 4 * 8),  # out of range: clipped
        ((0.534375, 0.3375, -2.8823037615171176e16, 0.909375), 0),  # as vggss.json has them
        ((0.26875, 1.0, 0.753125, 1.0), 0),  # no height
        ((0.6, 0.6, 0.2, 0.9), 0),  # its sides swapped
    ],
)
def test_faulty_boxes_are_clipped_and_may_cover_nothing(box, area):
    assert ground_truth(Annotation("", [box]), size=8).sum() == area


BOX = "<bbox><score>1</score><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bbox>"


def write_xml(folder: Path, name: str, *boxes: tuple) -> None:
    folder.mkdir(exist_ok=True)
    annotators = "".join(f"<annotator><type>object</type>{BOX.format(*box)}</annotator>" for box in boxes)
    (folder / f"{name}.xml").write_text(f"<annotation>{annotators}<note>none</note></annotation>")


def test_flickrs_annotators_boxes_make_a_consensus(tmp_path):
    folder = tmp_path / "Annotations"
    write_xml(folder, "10000130166", (0, 0, 128, 256), (64, 0, 192, 256), (64, 0, 255, 256))
    write_xml(folder, "5", (9, 9, 999, 9))
    touch(tmp_path / "frames", "10000130166.jpg")
    touch(tmp_path / "audio", "10000130166.wav")
    (tmp_path / "flickr_test.csv").write_text("10000130166,202\n")
    found = list_clips(ClipFolder(str(tmp_path), ids=str(tmp_path / "flickr_test.csv"), annotations=str(folder)))
    assert found.clips[0].annotation is not None
    gt = ground_truth(found.clips[0].annotation)
    assert gt.shape == (224, 224)
    assert gt[100, [0, 55, 56, 111, 112, 167, 168, 222, 223]].tolist() == [0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5, 0]
    assert torch.equal(gt, gt[:1].expand(224, 224))


def test_faulty_flickr_annotations_name_the_file(tmp_path):
    tmp_path = tmp_path / "Annotations"
    write_xml(tmp_path, "1")
    with pytest.raises(ValueError, match="no <bbox> in any of 1 files"):
        read_annotations(tmp_path)
    for box, told in (((0, 0, 300, 1), "300"), ((9, 0, 8, 1), "'9'"), ((0, 0, "wide", 1), "wide")):
        write_xml(tmp_path, "1", box)
        with pytest.raises(ValueError, match=rf"1\.xml: a <bbox> has .*{told}.* should be pixels in 0\.\.256"):
            read_annotations(tmp_path)
    (tmp_path / "1.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"1\.xml: no element found"):
        read_annotations(tmp_path)
    (tmp_path / "1.xml").write_text("<?xml version='1.0' encoding='ansi'?><annotation/>")
    with pytest.raises(ValueError, match=r"1\.xml: unknown encoding: ansi"):
        read_annotations(tmp_path)
    (tmp_path / "1.xml").unlink()
    with pytest.raises(ValueError, match=r"Annotations holds no annotations; .*<id>\.xml"):
        read_annotations(tmp_path)


def test_clips_are_found_in_any_format_and_unlisted_files_are_ignored(tmp_path):
    touch(tmp_path / "frames", "a.jpg", "b.PNG", "c.webp", "notes.txt", "._a.jpg", "extra.png")
    touch(tmp_path / "audio", "a.wav", "a.m4a", "b.flac", "c.ogg", "lonely.wav")  # libsndfile reads no m4a
    found = list_clips(ClipFolder(str(tmp_path)))
    assert [clip.name for clip in found.clips] == ["a", "b", "c"]
    assert found.clips[1].frame == tmp_path / "frames" / "b.PNG"
    assert found.clips[2].sound == tmp_path / "audio" / "c.ogg"


def test_frames_and_sounds_may_lie_in_the_root_itself_or_elsewhere(tmp_path):
    touch(tmp_path / "flat", "a.jpg", "a.wav")
    touch(tmp_path / "elsewhere", "a.wav")
    flat = list_clips(ClipFolder(str(tmp_path / "flat"), frames=".", audio="."))
    assert flat.clips[0].sound == tmp_path / "flat" / "a.wav"
    apart = list_clips(ClipFolder(str(tmp_path / "flat"), frames=".", audio=str(tmp_path / "elsewhere")))
    assert apart.clips[0].sound == tmp_path / "elsewhere" / "a.wav"


def test_clips_come_in_the_lists_order_and_what_they_lack_is_told(tmp_path):
    touch(tmp_path / "frames", "a.jpg", "b.jpg", "c.jpg")
    touch(tmp_path / "audio", "a.wav", "b.wav", "d.wav")
    (tmp_path / "list.txt").write_text("c\nb\nd\ne\na\n")
    found = list_clips(ClipFolder(str(tmp_path), ids=str(tmp_path / "list.txt")))
    assert [clip.name for clip in found.clips] == ["b", "a"]
    assert found.missing == ["c (sound)", "d (frame)", "e (frame and sound)"]


def test_listed_clips_without_annotation_and_twofold_files_are_errors(tmp_path):
    touch(tmp_path / "frames", "a.jpg")
    touch(tmp_path / "audio", "a.wav")
    (tmp_path / "list.txt").write_text("a\n")
    (tmp_path / "vggss.json").write_text('[{"file": "b", "class": "c", "bbox": []}]')
    with pytest.raises(ValueError, match=r"list\.txt lists clips that .*vggss\.json does not annotate: a"):
        list_clips(ClipFolder(str(tmp_path), ids=str(tmp_path / "list.txt"), annotations=str(tmp_path / "vggss.json")))
    touch(tmp_path / "frames", "a.png")
    with pytest.raises(ValueError, match=r"two files for clip a: a.* and a"):
        list_clips(ClipFolder(str(tmp_path)))


def test_files_may_keep_the_suffix_of_what_they_were_made_of(tmp_path):
    touch(tmp_path / "frames", "a.mp4.png", "b.c.jpg")
    touch(tmp_path / "audio", "a.mp4.wav", "b.c.wav")
    (tmp_path / "vggss.json").write_text('[{"file": "a.mp4", "class": "c", "bbox": []}]')
    assert [clip.name for clip in list_clips(ClipFolder(str(tmp_path))).clips] == ["a", "b.c"]
    (clip,) = list_clips(ClipFolder(str(tmp_path), annotations=str(tmp_path / "vggss.json"))).clips
    assert clip.sound.name == "a.mp4.wav"
    touch(tmp_path / "frames", "a.jpg")
    with pytest.raises(ValueError, match="two files for clip a"):
        list_clips(ClipFolder(str(tmp_path)))


def test_a_folder_without_clips_is_an_error_that_says_where_it_looked(tmp_path):
    touch(tmp_path / "frames", "a.jpg")
    touch(tmp_path / "audio")
    with pytest.raises(ValueError, match=r"no clips found: no files in .*frames and .*audio"):
        list_clips(ClipFolder(str(tmp_path)))
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(ValueError, match=r"none\.json annotates no clips"):
        list_clips(ClipFolder(str(tmp_path), annotations=str(tmp_path / "none.json")))
    touch(tmp_path / "audio", "c.wav")
    with pytest.raises(ValueError, match=r"no name is both a frame's \(a\) and a sound's \(c\) in .*frames and "):
        list_clips(ClipFolder(str(tmp_path)))
    (tmp_path / "list.txt").write_text("b.jpg\n")
    with pytest.raises(ValueError, match=r"none of the 1 listed \(b\) has its files"):
        list_clips(ClipFolder(str(tmp_path), ids=str(tmp_path / "list.txt")))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_clips(ClipFolder(str(tmp_path), audio="nowhere"))


def test_leakage_is_found_between_lists_of_any_kind(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "test.csv").write_text("d,1\nc,2\na,3\n")
    (tmp_path / "clean.json").write_text('[{"file": "d", "class": "c", "bbox": []}]')
    with pytest.raises(LeakageError, match=r"2 of the 3 .*test\.csv clips are also training clips: c, a"):
        check_leakage(str(tmp_path / "train.txt"), str(tmp_path / "test.csv"))
    check_leakage(str(tmp_path / "train.txt"), str(tmp_path / "clean.json"))
    assert "no clip is in both: 3 in" in capsys.readouterr().out


VGG_CLIPS = ["zpWuikVorYg_000032", "-x_uikVorY9_000000"]


@pytest.mark.parametrize(
    "written",
    [
        "zpWuikVorYg_000032.mp4\nvideos/-x_uikVorY9_000000.WAV\n",
        "C:\\clips\\zpWuikVorYg_000032.jpg\n-x_uikVorY9_000000\n",
        "zpWuikVorYg,32,elk bugling,train\n-x_uikVorY9,0,people coughing,test\n",
        "# YTID, start_seconds\nzpWuikVorYg, 32.000, 42.000, /m/0\n-x_uikVorY9, 0.000, 10.000, /m/1\n",
        "zpWuikVorYg_000032 elk bugling, far\n-x_uikVorY9_000000.mp4\tpeople coughing\n",
        "file,class\nzpWuikVorYg_000032,a\n-x_uikVorY9_000000,b\n",
        "\ufeffzpWuikVorYg_000032\n-x_uikVorY9_000000\n",
    ],
)
def test_leakage_is_found_however_a_list_writes_its_ids(tmp_path, written):
    (tmp_path / "train.csv").write_text(written, encoding="utf-8")
    (tmp_path / "test.txt").write_text("\n".join(VGG_CLIPS))
    assert read_ids(tmp_path / "train.csv") == VGG_CLIPS
    with pytest.raises(LeakageError, match="2 of the 2"):
        check_leakage(str(tmp_path / "train.csv"), str(tmp_path / "test.txt"))


def test_leakage_is_found_between_files_that_pad_seconds_and_files_that_do_not():
    with pytest.raises(LeakageError, match="2 of the 2 test clips"):
        refuse_leakage(["zpWuikVorYg_32", "-x_uikVorY9_0"], VGG_CLIPS, "test")


@pytest.mark.parametrize("written", ["zpWuikVorYg", "zpWuikVorYg_32000_42000", "0\n1", "zpWuikVorYg 32 elk bugling"])
def test_lists_that_write_ids_differently_are_not_said_to_share_nothing(tmp_path, written):
    (tmp_path / "train.txt").write_text(written)
    (tmp_path / "test.txt").write_text("\n".join(VGG_CLIPS))
    with pytest.raises(ValueError, match=f"cannot tell .*'{written.splitlines()[0]}' and 'zpWuikVorYg_000032'"):
        check_leakage(str(tmp_path / "train.txt"), str(tmp_path / "test.txt"))


def test_numbers_as_long_as_youtubes_ids_keep_to_themselves(tmp_path):
    (tmp_path / "flickr_test.csv").write_text("10000130166,202\n10007936344,0\n")
    assert read_ids(tmp_path / "flickr_test.csv") == ["10000130166", "10007936344"]


def test_a_list_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("zpWuikVorYg_000032\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.txt must be text in UTF-8"):
        read_ids(tmp_path / "a.txt")


def test_a_list_with_a_quotation_mark_that_is_not_closed_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('zpWuikVorYg_000032,"dog\n' + "zpWuikVorYg_000042,cat\n" * 6000)
    with pytest.raises(ValueError, match=r"a\.csv cannot be read as csv \(a quotation mark that is not closed\?\)"):
        read_ids(tmp_path / "a.csv")


def test_leakage_can_be_a_warning():
    with pytest.warns(UserWarning, match="1 of the 2 test clips"):
        refuse_leakage(["a", "b"], ["b", "c"], "test", "warn")
