"""The stand-in for the Hub, against the clients that it is for."""

from __future__ import annotations

import subprocess
import sys

import yaml
from conftest import make_model, make_tokenizer
from hub import Hub

# A process of its own: the clients read their endpoint when they are imported.
SCRIPT = """
import sys

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

def raises(error, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except error as caught:
        return caught
    raise AssertionError(f"no {error.__name__}")

def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

api, load = HfApi(), AutoModelForCausalLM.from_pretrained
assert api.whoami()["name"] == "tester"

# Models: pushed twice, read at a commit and at main.
old, new, tokenizer = load(sys.argv[1]), load(sys.argv[2]), AutoTokenizer.from_pretrained(sys.argv[2])
assert not same(old, new)
first = old.push_to_hub("tester/model").oid
new.push_to_hub("tester/model")
tokenizer.push_to_hub("tester/model")
assert same(load("tester/model", revision=first), old) and same(load("tester/model"), new)
assert AutoTokenizer.from_pretrained("tester/model").get_vocab() == tokenizer.get_vocab()
head = api.model_info("tester/model").sha
assert len(first) == len(head) == 40 and first != head
assert new.push_to_hub("tester/model").oid == head  # nothing new, no commit
old.push_to_hub("tester/model", revision="branch")
assert same(load("tester/model", revision="branch"), old) and same(load("tester/model"), new)
assert same(load(snapshot_download("tester/model")), new)
ModelCard("---\\nlicense: mit\\n---\\n# A card\\n").push_to_hub("tester/model")
assert ModelCard.load("tester/model").data.license == api.model_info("tester/model").card_data.license == "mit"
broken = dict(path_in_repo="README.md", path_or_fileobj=b"---\\na: [\\n---\\n")
raises(ValueError, api.upload_file, repo_id="tester/model", **broken)
api.upload_folder(repo_id="tester/model", folder_path=sys.argv[1], path_in_repo="sub/folder")
assert same(load("tester/model", subfolder="sub/folder"), old)
api.delete_folder("sub", "tester/model")
assert not [path for path in api.list_repo_files("tester/model") if path.startswith("sub")]

# Data sets: pushed twice, with an edited card in between.
rows = Dataset.from_dict({"ids": [[i, i + 1] for i in range(10)]})
rows.push_to_hub("tester/rows")
assert load_dataset("tester/rows", split="train").to_dict() == rows.to_dict()
assert list(load_dataset("tester/rows", split="train", streaming=True)) == list(rows)
before = api.dataset_info("tester/rows").sha
card = open(hf_hub_download("tester/rows", "README.md", repo_type="dataset")).read()
card = card.replace("---\\n", "---\\nours: {kept: [1]}\\n", 1) + "\\nOur text.\\n"
edit = dict(repo_id="tester/rows", repo_type="dataset", path_in_repo="README.md", path_or_fileobj=card.encode())
assert raises(HfHubHTTPError, api.upload_file, parent_commit="0" * 40, **edit).response.status_code == 412
api.upload_file(parent_commit=before, **edit)
rows.select(range(7)).push_to_hub("tester/rows", num_shards=2)
assert len(load_dataset("tester/rows", split="train")) == 7
assert len(load_dataset("tester/rows", split="train", revision=before)) == 10
DatasetDict(a=rows, b=rows.select(range(3))).push_to_hub("tester/splits")
assert {name: len(split) for name, split in load_dataset("tester/splits").items()} == {"a": 10, "b": 3}

# What is not there.
missing = raises(HfHubHTTPError, api.create_repo, "model")
assert missing.response.status_code == 409 and api.create_repo("model", exist_ok=True).repo_id == "tester/model"
raises(RepositoryNotFoundError, hf_hub_download, "tester/nothing", "config.json")
raises(RepositoryNotFoundError, api.dataset_info, "tester/model")
raises(RepositoryNotFoundError, api.model_info, "tester/nothing", token=False)
raises(EntryNotFoundError, hf_hub_download, "tester/model", "nothing.json")
raises(EntryNotFoundError, api.delete_file, "nothing.json", "tester/model")
raises(RevisionNotFoundError, hf_hub_download, "tester/model", "config.json", revision="0" * 40)
raises(RevisionNotFoundError, api.model_info, "tester/model", revision="nothing")
raises(DatasetNotFoundError, load_dataset, "tester/nothing")
raises(OSError, load, "tester/nothing")
raises(HfHubHTTPError, api.upload_file, token="hf_wrong", **edit)

assert open(hf_hub_download("tester/put", "a b/\\u00e9.txt", revision=sys.argv[3])).read() == "as put"
raises(HfHubHTTPError, api.list_repo_commits, "tester/model")
"""


def test_unmodified_clients(tmp_path):
    """Pushes and reads of models, data sets and cards by transformers, datasets and huggingface_hub."""
    for seed in (0, 1):
        make_model(seed).save_pretrained(tmp_path / str(seed))
        make_tokenizer().save_pretrained(tmp_path / str(seed))
    with Hub() as hub:
        put = hub.put("model", "tester/put", {"a b/é.txt": b"as put"})
        hub.put("model", "tester/put", {"a b/é.txt": b"later"})
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "0"), str(tmp_path / "1"), put],
            env=hub.env(tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        # The last line of the script asks for what the stand-in does not answer.
        assert [line.split("?")[0] for line in hub.unknown] == ["GET /api/models/tester/model/commits/main"]
    files = hub.files("dataset", "tester/rows")
    assert sorted(files) == [".gitattributes", "README.md", *(f"data/train-0000{i}-of-00002.parquet" for i in (0, 1))]
    _, front, body = files["README.md"].decode().split("---\n")
    assert yaml.safe_load(front)["ours"] == {"kept": [1]} and "dataset_info" in front and "Our text." in body
    assert hub.files("model", "tester/put", put)["a b/é.txt"] == b"as put"
