# The captioning server, and every other command, on CPUs, with the packages that are tested:
#
#   docker build -f deploy/docker/cpu.Dockerfile -t vlv:cpu .
#   docker run --read-only --tmpfs /tmp --shm-size 1g -v "$PWD/assets/vlv-tiny:/models/vlv:ro" -p 127.0.0.1:8000:8000 \
#     vlv:cpu serve.server --ckpt /models/vlv --host 0.0.0.0 --no-auth
ARG PYTHON=python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/vlv/bin:$PATH
RUN python -m venv /opt/vlv
WORKDIR /src
COPY requirements/cpu.lock requirements/cpu.lock
RUN pip install --no-deps -r requirements/cpu.lock
# some indexes deliver a CUDA build of torch, which does not import without its libraries
RUN python -c 'import torch' || pip install "$(grep '^torch==' requirements/cpu.lock)"
COPY . .
RUN pip install --no-deps --no-build-isolation . \
    && python deploy/docker/sbom.py >/opt/vlv/sbom.cdx.json

FROM ${PYTHON}
# vLLM's CPU kernels are linked against libnuma
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/* \
    && mkdir /cache && chown 10001:10001 /cache
COPY --from=build /opt/vlv /opt/vlv
ENV PATH=/opt/vlv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp USER=vlv \
    XDG_CACHE_HOME=/cache HF_HOME=/cache/hf
WORKDIR /tmp
VOLUME /cache
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["python", "-m"]
CMD ["serve.server", "--help"]
