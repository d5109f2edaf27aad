# Both sides: `docker build --target server -t deprune-server .`, and `--target device -t deprune-device`.
FROM python:3.11-slim AS base
# A CPU build of torch: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_EXTRA_INDEX_URL
# What the code needs, in layers of their own before it: large, and rarely other. torch first, which is the largest.
WORKDIR /build
COPY constraints.txt .
RUN python3 -m pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml .
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > needed \
    && python3 -m pip install --no-cache-dir -c constraints.txt -r needed

FROM base AS built
COPY hatch_build.py README.md LICENSE ./
COPY protos protos
COPY recipes recipes
COPY common common
COPY device_client device_client
COPY edge_server edge_server
RUN python3 -m pip wheel --no-cache-dir --no-deps -w /wheel .

FROM base AS deprune
COPY --from=built /wheel /wheel
RUN python3 -m pip install --no-cache-dir --no-deps /wheel/*.whl
# Nobody's privileges, under a number that no account of the host is likely to have.
RUN useradd --uid 10001 --create-home deprune && install -d -o deprune /runs
USER deprune
# Runs go to a volume, and relative paths lie in it.
WORKDIR /runs
VOLUME /runs
# Waiting threads must not take the cores from the other side on a shared machine. What numba has compiled it uses where
# it may write there, so this user compiles it: for the processor that builds the image, others do at first use.
ENV OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/home/deprune/numba
RUN python3 -c "import common.codecs.loops, common.codecs.mixing"

FROM deprune AS device
ENTRYPOINT ["device-client"]

FROM deprune AS server
# Of a server in the clear on its usual port; elsewhere give docker run another, or --no-healthcheck.
HEALTHCHECK --start-period=60s CMD ["python3", "-c", "import grpc; from grpc_health.v1 import health_pb2 as h, health_pb2_grpc as s; assert s.HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check(h.HealthCheckRequest(), timeout=5).status == 1"]
ENTRYPOINT ["edge-server"]
