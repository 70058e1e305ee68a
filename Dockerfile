# Two images, to be built in the project's folder:
#
#   docker build --target gpu --build-arg GIT_COMMIT="$(git rev-parse HEAD)" --tag s3-megatron:gpu .
#   docker build --target cpu --build-arg GIT_COMMIT="$(git rev-parse HEAD)" --tag s3-megatron:cpu .
#
# gpu: for training. cpu: for rehearsals and for `s3-megatron check` without a GPU.
# tests/launch/test_dockerfile.py holds this file to what its comments say.

# Python 3.12 with torch, Transformer Engine and Apex built for one another: none of them may be replaced.
ARG PYTORCH_TAG=25.09-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH_TAG} AS gpu

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# Empty, as the container's own constraints leave out what it compiled itself; container.txt is all that it has.
ENV PIP_CONSTRAINT="" PIP_NO_CACHE_DIR=1
WORKDIR /opt/s3-megatron
RUN pip list --format=freeze | LC_ALL=C sort > container.txt \
    && grep --extended-regexp '^torch==' container.txt \
    && grep --extended-regexp '^transformer[-_]engine==' container.txt

# What the packages below need, less torch and what itself needs torch, in versions that go with the container's.
RUN pip install --constraint container.txt \
    backports.zstd einops filelock flask-restful hjson huggingface_hub jinja2 msgpack ninja numpy omegaconf packaging psutil \
    py-cpuinfo py-spy pybind11 pydantic pyyaml rich safetensors sentencepiece setuptools tiktoken tqdm transformers \
    typer wandb

# These do ask for torch: they come without what they ask for. They are built with a setuptools of their own.
COPY constraints.txt pins.txt
RUN pip install --no-deps --constraint pins.txt accelerate deepspeed megatron-core
COPY pyproject.toml setup.py README.md LICENSE ./
COPY s3_megatron s3_megatron
COPY configs configs
COPY launch/slurm launch/slurm
COPY patches patches
RUN pip install --no-deps .

# Whatever the container brought is still what it was.
RUN pip list --format=freeze | LC_ALL=C sort > now.txt \
    && { ! LC_ALL=C comm -23 container.txt now.txt | grep . ; } \
    && python -c 'import torch; assert f"torch=={torch.__version__}\n" in open("container.txt")'

ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="s3-megatron" org.opencontainers.image.revision="${GIT_COMMIT}"
USER 1000:1000
WORKDIR /workspace


FROM python:3.12.12-slim-bookworm AS cpu

# DeepSpeed compiles its CPU optimizer, and S3 its kernel, with what the distribution has; Debian keeps no old versions.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/s3-megatron
COPY pyproject.toml setup.py README.md LICENSE constraints.txt ./
COPY s3_megatron s3_megatron
COPY configs configs
COPY launch/slurm launch/slurm
COPY patches patches
RUN pip install --constraint constraints.txt setuptools \
    && pip install --constraint constraints.txt --no-build-isolation '.[megatron,deepspeed,data,jobs]' \
    && useradd --create-home --uid 1000 trainer

ARG GIT_COMMIT=unknown
LABEL org.opencontainers.image.title="s3-megatron" org.opencontainers.image.revision="${GIT_COMMIT}"
ENV S3_REHEARSAL=1
USER 1000:1000
WORKDIR /workspace
