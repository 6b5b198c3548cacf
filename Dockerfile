#   docker build --target gateway -t mull:gateway .    no torch, no vLLM
#   docker build --target router -t mull:router .      vllm-router, for the chart
#   docker build --target gpu -t mull:gpu .            docker run -p 127.0.0.1:8000:8000 --gpus all mull:gpu Qwen/Qwen3-8B
#   docker build --target cpu -t mull:cpu .            docker run -p 127.0.0.1:8000:8000 mull:cpu
#
# docs/deploy.md has the rest: training, Ray, an SBOM. The user is 2000 throughout: `vllm` in vLLM's own image.

FROM python:3.11.14-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 2000 mull
WORKDIR /opt/mull

FROM base AS router
RUN pip install vllm-router==0.1.17
USER 2000
ENTRYPOINT ["vllm-router"]

# Dependencies come first, in a layer that only these files make stale; then Mull itself.
FROM base AS files
COPY LICENSE pyproject.toml constraints.txt ./

FROM files AS gateway-build
RUN python -m venv .venv && .venv/bin/pip install --constraint constraints.txt .
COPY . .
RUN .venv/bin/pip install --no-deps --force-reinstall .

FROM base AS runtime
ENV PATH=/opt/mull/.venv/bin:$PATH
USER 2000
WORKDIR /home/mull
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

FROM runtime AS gateway
COPY --from=gateway-build /opt/mull/.venv /opt/mull/.venv
ENTRYPOINT ["mull", "gateway", "--host", "0.0.0.0"]

# What vLLM's image brings stays as it is: of two constraints on a package the first counts, and ours come second.
FROM vllm/vllm-openai:v0.32.0 AS gpu
ARG EXTRAS="" PACKAGES=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/mull
COPY LICENSE pyproject.toml constraints.txt ./
# hadolint ignore=SC2086
RUN python3 -m pip freeze | grep == \
    | awk -F== '{ key = tolower($1); gsub(/[_.]/, "-", key) } !(key in had) { had[key]; print }' - constraints.txt \
    > both.txt \
    && python3 -m pip install --constraint both.txt ".${EXTRAS:+[$EXTRAS]}" $PACKAGES
COPY . .
RUN python3 -m pip install --no-deps --force-reinstall .
USER 2000
WORKDIR /home/vllm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["mull", "serve", "--host", "0.0.0.0"]

FROM files AS cpu-build
COPY scripts/install.sh scripts/
RUN MULL_DEVICE=cpu scripts/install.sh none
COPY . .
RUN .venv/bin/pip install --no-deps --no-build-isolation .

# Last, and so the default target: it runs anywhere.
FROM runtime AS cpu
USER 0
# vLLM's CPU kernels link libnuma; torch and Triton compile small kernels while serving.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
USER 2000
COPY --from=cpu-build /opt/mull/.venv /opt/mull/.venv
ENTRYPOINT ["mull", "serve", "--host", "0.0.0.0"]
