#!/usr/bin/env bash
# Create or complete the virtual environment of this checkout (`make env`). It may be interrupted and repeated:
# what is done is not done again.
#
#   STACK=classic  versions to install, requirements/STACK.txt: classic or onedl. Default: onedl for a GPU too new
#                  for classic; else classic, if its environment exists or a Python for it is found; else onedl
#   PYTHON=...     interpreter to use (default: the newest suitable one)
#   GPU=0          ignore the GPU
#
# With --stack, print the chosen stack and exit. Logs: VENV/.steps/*.log. mmcv wheels: ~/.cache/emo2_mm/wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME # packages there would hide those of the environment
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() {
    printf 'error: %s\n' "$1" >&2
    [ $# = 1 ] || printf '%s\n' "${@:2}" >&2
    exit 1
}

# --- Stack, GPU and Python ------------------------------------------------------------------------

use_stack() { # what differs between the stacks, except requirements/STACK.txt
    STACK=$1
    case $STACK in # gpus: lowest and highest compute capability that its torch is built for
    classic) venv=.venv minors='11 10 9 8' mmcv=mmcv cuda=12.1 gpus='5.0 9.0' ;;
    onedl) venv=.venv-onedl minors='12 11 10' mmcv=onedl-mmcv cuda=13.0 gpus='7.5 12.1' ;;
    *) die "unknown STACK=$STACK; known stacks: classic, onedl" ;;
    esac
    pins=requirements/$STACK.txt
    PATH=${PATH//"$PWD/$venv/bin:"/} # an activated environment must not be created from itself
}

ascending() { printf '%s\n' "$@" | sort -VC; }

find_python() { # set $python and $version
    local minor candidates=()
    for minor in $minors; do
        candidates+=("python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python)
    done
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for python in "${candidates[@]}" ${PYTHON:-python3 python}; do
        version=$("$python" -c 'import ensurepip, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
            continue
        [[ " $minors " != *" ${version#3.} "* ]] || return 0
    done
    return 1
}

need_python() {
    find_python || die \
        "${PYTHON:+PYTHON=$PYTHON: }the $STACK stack needs Python 3.${minors##* } - 3.${minors%% *} with venv." \
        'Install one, for example:
  Debian 12:      apt-get install python3.11 python3.11-venv python3.11-dev
  Ubuntu 22.04:   apt-get install python3.10 python3.10-venv python3.10-dev
  Fedora:         dnf install python3.11 python3.11-devel
  conda:          conda create -p ~/py311 python=3.11, then make env PYTHON=~/py311/bin/python
or name one: make env PYTHON=/path/to/python3.11'
}

pin() { sed -n "s/^$1[=>]=\([0-9.]*\).*/\1/p" "$pins"; } # lowest allowed version of a package

gpu= # compute capability of the newest GPU, such as 9.0
if [ "${GPU:-1}" != 0 ] && command -v nvidia-smi >/dev/null; then
    gpu=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '[0-9]*\.[0-9]*' |
        sort -V | tail -n 1) || gpu=
fi
if [ -n "${STACK:-}" ]; then
    use_stack "$STACK"
else
    use_stack classic
    if [ -n "$gpu" ] && ! ascending "$gpu" "${gpus#* }"; then
        use_stack onedl
    elif [ -n "${PYTHON:-}" ] || [ ! -d "$venv" ]; then
        find_python || use_stack onedl
    fi
fi
if [ "${1:-}" = --stack ]; then echo "$STACK" && exit; fi

# --- Progress -------------------------------------------------------------------------------------

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
if [ -t 1 ]; then every=1 start=$'\r' end=$'\e[K'; else every=30 start='' end=$'\n'; fi
child='' scratch=''

clean_up() {
    [ -z "$child" ] || kill -KILL -- "-$child" 2>/dev/null || true
    [ -z "$scratch" ] || rm -rf "$scratch"
}
interrupted() {
    trap '' INT TERM HUP
    printf '\nInterrupted. Run the same command again to continue.\n' >&2
    exit 130
}
trap clean_up EXIT
trap interrupted INT TERM HUP

step() { # TITLE: what follows, and where its output goes
    log=$venv/.steps/${1%%[ :,]*}.log
    rm -f "$log"
    echo "[$(clock "$SECONDS")] $1"
}

# Run a command with its output in the step's log, and show the time spent and left.
#   run EXPECTED_SECONDS COMMAND...
run() {
    local begun=$SECONDS next=$((SECONDS + every)) passed left built status=0
    printf '+ %s\n' "${*:2}" >>"$log"
    set -m # a process group of its own, so that an interrupt reaches compilers, too
    "${@:2}" </dev/null >>"$log" 2>&1 &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.1
        [ "$SECONDS" -ge "$next" ] || continue
        next=$((SECONDS + every)) passed=$((SECONDS - begun)) left=$(($1 - SECONDS + begun))
        built=$(grep -ao '^ *\[[0-9]*/[0-9]*\]' "$log" | tail -n 1 | tr -d ' []') || true # of ninja: done/all
        [ "$((${built%/*}))" -lt 3 ] || left=$((passed * (${built#*/} - ${built%/*}) / ${built%/*}))
        if [ "$left" -gt 0 ]; then left="about $(clock "$left") left"; else left='longer than usual'; fi
        printf '%s       %s passed, %s | %s%s' "$start" "$(clock "$passed")" "$left" \
            "${built:+compiled }${built:-$(tail -n 1 "$log" | tr -d '\r' | cut -c1-50)}" "$end"
    done
    wait "$child" || status=$?
    child=
    [ ! -t 1 ] || printf '\r\e[K'
    return "$status"
}

failed() { # MESSAGE: show it with the end of the log
    tail -n 15 "$log" | cut -c1-200 | sed 's/^/    | /'
    die "$1" "Full output: $log. Fix the cause and run the same command again."
}

# --- mmcv -----------------------------------------------------------------------------------------

set_flavour() { # cpu, or the CUDA version that torch is built for
    flavour=$1
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/emo2_mm/wheels
    cache+=/$mmcv-$mmcv_version-torch$torch_version-cp${version/./}-$flavour
    case $STACK in # pages that list prebuilt wheels
    classic) prebuilt=https://download.openmmlab.com/mmcv/dist/$flavour/torch2.1.0/index.html ;;
    onedl) prebuilt=https://mmwheels.onedl.ai/$flavour-torch${torch_version//./}/simple/onedl-mmcv/ ;;
    esac
}

cached_wheel() { find "$cache" -name "*_$(uname -m).whl" 2>/dev/null | grep -m 1 .; }

keep_wheel() { # move the wheel in $scratch to the cache, whole or not at all
    mkdir -p "$cache"
    cp "$scratch"/*.whl "$cache/.new.$$"
    mv "$cache/.new.$$" "$cache/$(basename "$scratch"/*.whl)"
    rm -rf "$scratch"
}

download_wheel() {
    echo "       looking for a prebuilt wheel at $prebuilt"
    scratch=$(mktemp -d)
    run 30 "$venv/bin/python" -m pip download --timeout 15 --retries 1 --progress-bar off --no-deps --no-index \
        --only-binary :all: -f "$prebuilt" -d "$scratch" "$(grep -o "^$mmcv[=>][^ ]*" "$pins")" && keep_wheel
}

check_compiler() {
    local missing=''
    command -v "${CXX:-g++}" >/dev/null || missing+=' g++'
    "$venv/bin/python" -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' \
        2>/dev/null || missing+=" python$version-dev"
    [ -z "$missing" ] || die "mmcv must be compiled (there is no prebuilt wheel), but these are missing:$missing" \
        "Debian, Ubuntu: apt-get install$missing      Fedora: dnf install gcc-c++ python$version-devel"
    [ "$flavour" = cpu ] || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] || command -v nvcc >/dev/null ||
        die 'mmcv must be compiled for the GPU, but the CUDA compiler nvcc was not found.' \
            "Install the CUDA toolkit $cuda (and set CUDA_HOME), or continue without the GPU: make env GPU=0"
}

build_wheel() {
    local jobs by_memory
    jobs=$(nproc)
    by_memory=$(awk '/^MemAvailable/ {print int($2 / 2000000) + 1}' /proc/meminfo) || true # 2 GB each
    [ "${by_memory:-$jobs}" -ge "$jobs" ] || jobs=$by_memory
    echo "       compiling $mmcv $mmcv_version for $flavour; log: $log"
    scratch=$(mktemp -d)
    # Without build isolation: where it does not see torch, mmcv silently builds without operators.
    # -O1 -g0 take a quarter of the time.
    run $((700 / jobs + 60)) env PATH="$PWD/$venv/bin:$PATH" TMPDIR="$scratch" CFLAGS='-O1 -g0' MMCV_WITH_OPS=1 \
        FORCE_CUDA="$([ "$flavour" = cpu ] && echo 0 || echo 1)" MAX_JOBS="$jobs" \
        "$venv/bin/python" -m pip wheel -v --no-deps --no-build-isolation --no-cache-dir --no-binary "$mmcv" \
        -w "$scratch" "$mmcv==$mmcv_version" || failed "$mmcv $mmcv_version could not be compiled"
    keep_wheel
}

check_operators() { # they load and give a correct result on each device
    "$venv/bin/python" - "$flavour" <<'PY'
import sys, torch
from mmcv.ops import nms
boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
for device in ['cpu'] + ['cuda'] * (sys.argv[1] != 'cpu'):
    kept = nms(boxes.to(device), torch.tensor([0.9, 0.8, 0.7]).to(device), iou_threshold=0.5)[1].tolist()
    assert kept == [0, 2], 'nms on %s kept boxes %s, not [0, 2]' % (device, kept)
PY
}

install_mmcv() {
    local source wheel
    for source in cached prebuilt compiled; do
        case $source in
        prebuilt) [ -z "$downloaded" ] && download_wheel || continue ;;
        compiled) check_compiler && build_wheel ;;
        esac
        wheel=$(cached_wheel) || continue
        echo "       installing $wheel"
        run 10 uv install -c "$pins" --reinstall-package "$mmcv" "$wheel" || failed "installing $wheel failed"
        if run 15 check_operators; then return; fi
        echo "       this $source wheel does not work here: discarded"
        rm -f "$wheel"
    done
    failed "the operators of $mmcv $mmcv_version as compiled here do not work"
}

# --- Set-up ---------------------------------------------------------------------------------------

uv() { "$venv/bin/uv" pip "$@"; }

configure_uv() { # it does not read pip's configuration
    local option variable value
    export VIRTUAL_ENV=$PWD/$venv UV_INDEX_STRATEGY=unsafe-best-match UV_SYSTEM_CERTS=1 UV_HTTP_TIMEOUT=180
    for option in index-url:UV_DEFAULT_INDEX extra-index-url:UV_INDEX find-links:UV_FIND_LINKS cert:SSL_CERT_FILE; do
        variable=PIP_$(tr a-z- A-Z_ <<<"${option%:*}")
        value=${!variable:-$("$venv/bin/python" -m pip config get "global.${option%:*}" 2>/dev/null)} || true
        [ -z "$value" ] || export "${option#*:}=$(xargs <<<"$value")"
    done
    [ -z "${UV_FIND_LINKS:-}" ] || export UV_FIND_LINKS=${UV_FIND_LINKS// /,}
}

# One at a time in a checkout; commands that outlive a killed run hold the lock, too.
if command -v flock >/dev/null; then
    exec 9<scripts/setup_env.sh
    flock -n 9 || { echo 'Another make env is running in this checkout; waiting for it.' && flock 9; }
fi
[ ! -d "$venv" ] || [ -d "$venv/.steps" ] ||
    die "$PWD/$venv was not created by make env. Move or delete it, and run this again."

flavour=cpu
if [ -n "$gpu" ] && ascending "${gpus% *}" "$gpu" "${gpus#* }"; then
    flavour=cu${cuda/./}
elif [ -n "$gpu" ]; then
    echo "The $STACK stack supports GPUs of compute capability ${gpus/ / to }, not $gpu: continuing without it." \
        '(classic: 5.0 to 9.0, onedl: 7.5 to 12.1)'
fi
inputs=$(cat "$pins" requirements/dev.txt setup.py pyproject.toml emo2_mm/version.py - <<<"$flavour" | sha256sum)
summary() { "$venv/bin/uv" pip list --format freeze 2>/dev/null | grep -E '^(torch|torchvision|(onedl-)?mm.*)==' | xargs; }

# The environment is kept unless it was moved, its interpreter is gone, or PYTHON asks for another version.
have=$(cat "$venv/.steps/python" 2>/dev/null) || true
{ "$venv/bin/python" -c '' && grep -F "$PWD/$venv" "$venv/bin/activate"; } >/dev/null 2>&1 || have=
if [ -n "${PYTHON:-}" ] || [ -z "$have" ]; then
    need_python
    [ "$version" = "$have" ] || have=
fi
if [ -n "$have" ]; then
    python=$venv/bin/python version=$have
    if [ "$(cat "$venv/.steps/complete" 2>/dev/null)" = "$inputs" ]; then
        echo "Environment $venv is complete ($(summary)); nothing to do."
        exit
    fi
fi

torch_version=$(pin torch) mmcv_version=$(pin "$mmcv") downloaded=
set_flavour "$flavour"
free_gb() { df -Pk "$1" | awk 'NR == 2 {print int($4 / 1048576)}'; }
need=$([ -n "$have" ] && echo 2 || echo 9)
[ "$(free_gb .)" -ge "$need" ] || die "$PWD has $(free_gb .) GB of free disk; $need GB are needed."
[ "$(free_gb "${TMPDIR:-/tmp}")" -ge 3 ] || die "${TMPDIR:-/tmp} has less than 3 GB of free disk." \
    'Set TMPDIR to another directory.'
"$python" -c 'import ctypes; [ctypes.CDLL(n) for n in ("libGL.so.1", "libgthread-2.0.so.0")]' 2>/dev/null ||
    die 'OpenCV needs libGL.so.1 and libgthread-2.0.so.0, which are missing.' \
        'Debian, Ubuntu: apt-get install libgl1 libglib2.0-0      Fedora: dnf install mesa-libGL glib2'

if [ -z "$have" ]; then
    rm -rf "$venv"
    mkdir -p "$venv/.steps"
    step "venv of Python $version: $venv ($STACK stack, $flavour)"
    run 10 "$python" -m venv "$venv" || failed "$python could not create an environment"
    echo "$version" >"$venv/.steps/python"
fi
rm -f "$venv/.steps/complete"
step 'installers: pip, uv'
run 10 "$venv/bin/python" -m pip install -c "$pins" pip setuptools wheel ninja psutil uv || failed 'pip failed'
configure_uv

mmcv_key="$mmcv $mmcv_version, torch $torch_version, $flavour"
[ "$(cat "$venv/.steps/mmcv" 2>/dev/null)" != "$mmcv_key" ] || mmcv_key=
if [ -n "$mmcv_key" ] && ! cached_wheel >/dev/null; then # an error now rather than after gigabytes of downloads
    downloaded=1
    download_wheel || check_compiler
fi

step "torch $torch_version, torchvision (2 to 3 GB, unless installed)"
run 90 uv install -c "$pins" torch torchvision numpy opencv-python || failed 'installing torch failed'
run 10 "$venv/bin/python" -c 'import cv2, torch, torchvision' || failed 'torch or OpenCV cannot be imported'
if [ "$flavour" != cpu ] && ! run 10 "$venv/bin/python" -c 'import torch; torch.zeros(1, device="cuda")'; then
    echo "       torch cannot use the GPU (is its driver older than CUDA $cuda?): continuing without it"
    set_flavour cpu
fi

if [ -n "$mmcv_key" ]; then
    step "mmcv with operators ($flavour)"
    install_mmcv
    echo "$mmcv_key" >"$venv/.steps/mmcv"
fi

step 'packages: mmpretrain, mmdet, mmsegmentation, tools of demo and tests, emo2_mm itself'
run 60 uv install -r "$pins" -r requirements/dev.txt || failed 'installing the packages failed'
run 10 uv install --no-deps --no-build-isolation -e . || failed 'emo2_mm could not be installed'

step 'check that everything imports and the operators work'
run 20 "$venv/bin/python" -c 'import mmdet, mmpretrain, mmseg' || failed 'a package cannot be imported'
run 10 check_operators || failed 'the operators of mmcv do not work any more: make clean env'
echo "$inputs" >"$venv/.steps/complete"
echo "Environment $venv is ready ($(summary)) after $(clock "$SECONDS") min."
