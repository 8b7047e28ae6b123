"""Public data sets in the layout that they come in."""

from __future__ import annotations

import json
import re
import sys
import warnings

import numpy as np
import pytest
from rich.console import Console
from support.images import exactly, opened, pictures, refused, told, write

from unicom_ext.data.images.standard import STANDARD
from unicom_ext.encoders.extract import extract
from unicom_ext.encoders.extract_config import ExtractConfig
from unicom_ext.retrieval.files import evaluate_files
from unicom_ext.utils.settings import ConfigError


def products(root):
    paths = ["bicycle_final/1_0.JPG", "bicycle_final/1_1.JPG", "sofa_final/2_0.JPG"]
    pictures(root, [*paths, "sofa_final/3_0.JPG", "sofa_final/3_1.JPG"])
    head = "image_id class_id super_class_id path\n"
    write(root / "Ebay_train.txt", f"{head}1 1 1 {paths[0]}\n2 1 1 {paths[1]}\n3 10 9 {paths[2]}\n")
    write(
        root / "Ebay_test.txt",
        f"{head}4 11319 9 sofa_final/3_0.JPG\n5 11319 9 sofa_final/3_1.JPG\n",
    )
    train = [(paths[0], "1", ""), (paths[1], "1", ""), (paths[2], "10", "")]
    test = [("sofa_final/3_0.JPG", "11319", ""), ("sofa_final/3_1.JPG", "11319", "")]
    return train, test, None


def in_shop(root):
    paths = [f"img/WOMEN/Tees/id_0000000{i}/0{k}_front.jpg" for i in (1, 2, 3) for k in (1, 2)]
    pictures(root / "Img", paths)
    parts = ["train", "train", "query", "gallery", "gallery", "gallery"]
    lines = [
        f"{path:40} {path.split('/')[3]} {part:10}\n"
        for path, part in zip(paths, parts, strict=True)
    ]
    write(
        root / "Eval/list_eval_partition.txt",
        "6\nimage_name item_id evaluation_status\n" + "".join(lines),
    )
    rows = [(f"Img/{path}", path.split("/")[3], "") for path in paths]
    return rows[:2], rows[2:3], rows[3:]


BIRDS = [
    "001.Black_footed_Albatross/a_1.jpg", "100.Brown_Pelican/b_1.jpg",
    "101.White_Pelican/c_1.jpg", "200.Common_Yellowthroat/d_1.jpg",
]  # fmt: skip


def birds(root):
    pictures(root / "images", BIRDS)
    write(root / "images.txt", "".join(f"{i} {path}\n" for i, path in enumerate(BIRDS, 1)))
    labels = [path[:3].lstrip("0") for path in BIRDS]
    write(root / "image_class_labels.txt", "".join(f"{i} {n}\n" for i, n in enumerate(labels, 1)))
    return birds_of_folders(root)


def birds_of_folders(root):
    pictures(root / "images", BIRDS)
    rows = [(f"images/{path}", path.split("/")[0], "") for path in BIRDS]
    return rows[:2], rows[2:], None


def cars(root):
    io = pytest.importorskip("scipy.io")
    classes = [1, 98, 99, 196, 98]
    paths = [f"car_ims/{i:06d}.jpg" for i in range(1, 6)]
    pictures(root, paths)
    kinds = [(name, object) for name in ("relative_im_path", "bbox_x1", "class", "test")]
    annotations = np.empty((1, 5), kinds)
    for i, (path, number) in enumerate(zip(paths, classes, strict=True)):
        annotations[0, i] = (path, 1, np.uint8(number), 0)
    names = np.array([[f"Car {i} / van" for i in range(1, 197)]], object)
    io.savemat(root / "cars_annos.mat", {"annotations": annotations, "class_names": names})
    rows = [(path, f"Car {number} / van", "") for path, number in zip(paths, classes, strict=True)]
    return [rows[0], rows[1], rows[4]], rows[2:4], None


def cars_of_parts(root):
    io = pytest.importorskip("scipy.io")
    parts = {"cars_train": [1, 98, 196], "cars_test": [99, 98]}
    files = {
        "cars_train": "devkit/cars_train_annos.mat", "cars_test": "cars_test_annos_withlabels.mat"
    }  # fmt: skip
    (root / "devkit").mkdir(parents=True)
    rows = []
    for folder, classes in parts.items():
        kinds = [(name, object) for name in ("bbox_x1", "class", "fname")]
        annotations = np.empty((1, len(classes)), kinds)
        for i, number in enumerate(classes):
            annotations[0, i] = (1, np.uint8(number), f"{i + 1:05d}.jpg")
            rows.append((f"{folder}/{i + 1:05d}.jpg", f"Car {number} / van", ""))
        io.savemat(root / files[folder], {"annotations": annotations})
    pictures(root, [path for path, *_ in rows])
    names = np.array([[f"Car {i} / van" for i in range(1, 197)]], object)
    io.savemat(root / "devkit/cars_meta.mat", {"class_names": names})
    return [rows[0], rows[1], rows[4]], rows[2:4], None


def species(root):
    train = ["train_val2018/Aves/2761/a.jpg", "train_val2018/Aves/3/b.jpg"]
    test = ["train_val2018/Plantae/3/c.jpg"]
    pictures(root, [*train, *test])
    lists = root / "Inat_dataset_splits"
    write(lists / "Inaturalist_train_set1.txt", "\n".join(train) + "\n")
    write(lists / "Inaturalist_test_set1.txt", "\n".join(test) + "\n")
    return (
        [(train[0], "Aves/2761", ""), (train[1], "Aves/3", "")],
        [(test[0], "Plantae/3", "")],
        None,
    )


def image_path(part, name):
    return f"{part}/{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


QUERIES = {
    "0001": ("aa1 aa2", "Private"), "0002": ("aa2 aa1", "Private"), "0003": ("bb1", "Private"),
    "0004": ("cc1 aa1", "Public"), "0005": ("", "Ignored"),
}  # fmt: skip


def landmarks(root, queries=QUERIES, index=("bb1", "cc1", "aa2", "aa1"), folder=True):
    train = {"000a": 7, "000b": 7, "1234": 12}
    pictures(root, [image_path("train", name) for name in train])
    pictures(root, [image_path("test", name) for name in queries])
    pictures(root, [image_path("index", name) for name in index])
    part = "{}/" if folder else ""
    write(
        root / part.format("train") / "train_clean.csv",
        "landmark_id,images\n7,000a 000b\n12,1234\n",
    )
    rows = "".join(f"{name},{images},{usage}\n" for name, (images, usage) in queries.items())
    write(root / part.format("test") / "retrieval_solution_v2.1.csv", f"id,images,Usage\n{rows}")
    write(
        root / part.format("index") / "index.csv", "id\n" + "".join(f"{name}\n" for name in index)
    )
    classes = {"bb1": "0003", "aa1": "0001", "aa2": "0001"}
    return (
        [(image_path("train", name), str(number), "") for name, number in train.items()],
        [(image_path("test", name), found, "") for name, found in
         (("0001", "0001"), ("0002", "0001"), ("0003", "0003"))],
        [(image_path("index", name), classes.get(name), "") for name in index],
    )  # fmt: skip


MAKE = {
    "sop": products, "inshop": in_shop, "cub": birds, "cars": cars, "inat": species,
    "gldv2": landmarks,
}  # fmt: skip
SMALL = "ignore:.*is not the whole of"


@pytest.mark.filterwarnings(SMALL)
@pytest.mark.parametrize("layout", MAKE)
def test_official_parts(tmp_path, layout):
    train, query, gallery = MAKE[layout](tmp_path)
    for settings in ({}, {"layout": layout}):
        whole = opened(tmp_path, **settings)
        assert told(whole.train) == train
        assert told(whole.query) == query
        assert told(whole.gallery) == gallery
        assert whole.validation is None
        if gallery is not None:
            assert list(whole.gallery.class_names) == list(whole.query.class_names)


@pytest.mark.filterwarnings(SMALL)
def test_validation_is_cut_from_the_classes_to_train_on(tmp_path):
    train, query, _ = products(tmp_path)
    whole = opened(tmp_path, validation_fraction=0.5)
    assert sorted([*told(whole.train), *told(whole.validation)]) == sorted(train)
    assert told(whole.query) == query


@pytest.mark.filterwarnings(SMALL)
def test_birds_without_their_lists(tmp_path):
    train, query, _ = birds_of_folders(tmp_path)
    whole = opened(tmp_path, layout="cub")
    assert (told(whole.train), told(whole.query)) == (train, query)


@pytest.mark.filterwarnings(SMALL)
def test_cars_as_torchvision_downloads_them(tmp_path):
    train, query, _ = cars_of_parts(tmp_path)
    for settings in ({}, {"layout": "cars"}):
        whole = opened(tmp_path, **settings)
        assert (told(whole.train), told(whole.query)) == (train, query)
    file = tmp_path / "devkit/cars_meta.mat"
    file.write_text("MATLAB")
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: is not as it is published: "):
        opened(tmp_path)


@pytest.mark.filterwarnings(SMALL)
def test_clothes_whose_images_lie_beside_their_list(tmp_path):
    in_shop(tmp_path)
    (tmp_path / "Img/img").rename(tmp_path / "img")
    (tmp_path / "Img").rmdir()
    assert opened(tmp_path).query.name(0) == "img/WOMEN/Tees/id_00000002/01_front.jpg"


@pytest.mark.filterwarnings(SMALL)
def test_landmarks_of_other_lists(tmp_path):
    train, query, gallery = landmarks(tmp_path / "a", folder=False)
    whole = opened(tmp_path / "a")
    assert (told(whole.train), told(whole.query), told(whole.gallery)) == (train, query, gallery)
    (tmp_path / "a/train_clean.csv").unlink()
    write(tmp_path / "a/train.csv", "id,url,landmark_id\n1234,http://x,3\n")
    (tmp_path / "a/retrieval_solution_v2.1.csv").unlink()
    whole = opened(tmp_path / "a")
    assert told(whole.train) == [(image_path("train", "1234"), "3", "")]
    assert whole.query is whole.gallery is None


@pytest.mark.filterwarnings(SMALL)
def test_landmarks_whose_answers_share_some_images(tmp_path):
    """mAP@100 from the features of both parts is that of the lists of answers."""
    answers = {"0001": "aa1 aa2", "0002": "aa1", "0003": "aa2 bb1 aa1", "0004": "", "0006": "aa1"}
    landmarks(tmp_path, {query: (images, "Private") for query, images in answers.items()})
    parts = opened(tmp_path)
    assert parts.train.labels.shape == (3,)
    classes = parts.gallery.class_names
    assert list(classes) == ["0001", "0002", "0003"] == list(parts.query.class_names)
    assert [name for _, name, _ in told(parts.query)] == ["0001", "0002", "0003", None, "0002"]
    of = {parts.gallery.name(i)[-7:-4]: {classes[c] for c in row if c >= 0}
          for i, row in enumerate(parts.gallery.labels.tolist())}  # fmt: skip
    assert of == {"bb1": {"0003"}, "cc1": set(), "aa2": {"0001", "0003"},
                  "aa1": {"0001", "0002", "0003"}}  # fmt: skip

    for part in ("query", "gallery"):
        images = {"query": parts.query, "gallery": parts.gallery}[part]
        config = ExtractConfig(encoder="pixels", dim=2, part=part)
        extract(config, images, tmp_path / part, console=Console(quiet=True))
    lines = (tmp_path / "gallery/metadata/metadata_0000.jsonl").read_text().splitlines()
    assert [json.loads(line).get("classes") for line in lines] == [
        ["0003"], None, ["0001", "0003"], ["0001", "0002", "0003"]
    ]  # fmt: skip
    (result,) = evaluate_files(
        tmp_path / "query/img_emb", tmp_path / "query/true_labels.npy",
        tmp_path / "gallery/img_emb", tmp_path / "gallery/true_labels.npy",
        options={"ks": [100]},
    )  # fmt: skip
    assert (result.num_queries, result.num_unlabelled, result.num_distractors) == (4, 1, 1)
    query, gallery = (
        np.load(tmp_path / part / "img_emb/img_emb_0000.npy").astype(np.float64)
        for part in ("query", "gallery")
    )
    index = [parts.gallery.name(i)[-7:-4] for i in range(4)]
    averages = []
    for row, wanted in zip(query, map(str.split, answers.values()), strict=True):
        ranked = [index[i] for i in np.argsort(-(gallery @ row) / np.linalg.norm(gallery, axis=1))]
        hits = [ranked.index(image) + 1 for image in wanted]
        if wanted:
            averages.append(np.mean([(i + 1) / at for i, at in enumerate(sorted(hits))]))
    assert result.map_at_k[100] == pytest.approx(np.mean(averages))


@pytest.mark.filterwarnings(SMALL)
def test_landmarks_whose_answers_are_not_there(tmp_path):
    file = tmp_path / "test/retrieval_solution_v2.1.csv"
    landmarks(tmp_path, {"0001": ("aa1 dd1", "Private")})
    refused(tmp_path, f"{file}: names dd1, which is not in {tmp_path}/index/index.csv")
    landmarks(tmp_path, {"0001": ("aa1", "Public")})
    refused(tmp_path, f"{tmp_path}: has gallery, but no query")
    (tmp_path / "index/index.csv").unlink()
    refused(tmp_path, f"{tmp_path}: has neither index/index.csv nor index.csv")


def test_other_numbers_of_images_are_told(tmp_path, monkeypatch):
    products(tmp_path)
    message = (
        f"{tmp_path}: is not the whole of Stanford Online Products, or not it alone: images are 3 "
        "for train, not 59551, 2 for test, not 60502; results cannot be compared with published "
        "ones"
    )
    with pytest.warns(UserWarning, match=exactly(message)):
        opened(tmp_path)
    monkeypatch.setitem(STANDARD["sop"].counts, "train", (3, 5))
    monkeypatch.setitem(STANDARD["sop"].counts, "test", (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(tmp_path)


@pytest.mark.parametrize("layout", STANDARD)
def test_missing_files(tmp_path, layout):
    standard = STANDARD[layout]
    refused(
        tmp_path,
        f"{tmp_path}: is not {standard.title}: there is no {standard.needs[0]}. It needs "
        f"{', '.join(standard.needs)}; see {standard.page}",
        layout=layout,
    )


@pytest.mark.parametrize(
    ("layout", "file", "text", "message"),
    [
        ("sop", "Ebay_test.txt", "head\n1 1 1\n",
         "{file}: line 2: is '1 1 1', must be: image_id class_id super_class_id path"),
        ("sop", "Ebay_test.txt", b"\xff", "{file}: is not text in UTF-8"),
        ("sop", "Ebay_test.txt", "head\n1 1 1 sofa_final/9.JPG\n",
         "{root}: 1 of 4 images not found in {root}: sofa_final/9.JPG"),
        ("inshop", "Eval/list_eval_partition.txt", "1\nhead\nimg/a.jpg id_1 test\n",
         "{file}: img/a.jpg is for 'test', must be train, query or gallery"),
        ("cub", "image_class_labels.txt", "1 1\n2 100\n3 7\n",
         "{file}: 101.White_Pelican/c_1.jpg is of class 7"),
        ("cub", "image_class_labels.txt", "1 1\n",
         "{file}: 100.Brown_Pelican/b_1.jpg is of class none"),
        ("cub", "images.txt", "1 albatross/a.jpg\n",
         "{root}/images: has albatross/a.jpg, must be 001.NAME/... to 200.NAME/..."),
        ("cars", "cars_annos.mat", "MATLAB", "{file}: is not as it is published: .*"),
        ("inat", "Inat_dataset_splits/Inaturalist_test_set1.txt", "a/b.jpg\n",
         "{file}: has a/b.jpg, must be .../KINGDOM/SPECIES/IMAGE"),
        ("gldv2", "train/train_clean.csv", "id,images\n1,000a\n",
         "{file}: has no column landmark_id, but id, images"),
    ],
)  # fmt: skip
def test_lists_that_are_not_as_they_are_published(tmp_path, layout, file, text, message):
    MAKE[layout](tmp_path)
    write(tmp_path / file, text)
    message = re.escape(message.format(root=tmp_path, file=tmp_path / file)).replace(r"\.\*", ".*")
    with pytest.raises(ConfigError, match=f"^{message}$"):
        opened(tmp_path)


def test_cars_need_scipy(tmp_path, monkeypatch):
    cars(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refused(tmp_path, f"{tmp_path}/cars_annos.mat: .mat files need scipy: pip install scipy")


def test_folders_with_a_table_are_no_landmarks(tmp_path):
    pictures(tmp_path, ["train/0/1.png", "train/1/1.png", "test/1/2.png"])
    write(tmp_path / "train.csv", "id,label\n")
    assert told(opened(tmp_path).query) == [("test/1/2.png", "1", "")]
