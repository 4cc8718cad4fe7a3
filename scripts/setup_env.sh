#!/usr/bin/env bash
# Make or complete the environment of this checkout; `make env` calls it. It can be interrupted and
# repeated at any time: finished steps are not redone, unfinished ones are.
#
#   STACK=classic   the set of versions, a file requirements/STACK.txt: classic or onedl; without it
#                   classic, where there is a Python for that, else onedl
#   PYTHON=...      the interpreter to use; without it the newest suitable one is looked for
#   GPU=0           treat the machine as one without a GPU
#
# With --stack, it only prints which stack it would take.
#
# Below .venv or .venv-onedl: .steps/NAME holds the key of the inputs that step NAME was finished with,
# .steps/NAME.log what it printed. Built or downloaded mmcv wheels are kept in ~/.cache/emo2_mm/wheels.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME # they would put other packages before those of the environment
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() {
    printf 'make env: %s\n' "$@" >&2
    exit 1
}

# --- The stack ------------------------------------------------------------------------------------

use_stack() { # all that differs between the stacks, beside requirements/STACK.txt
    STACK=$1
    case $STACK in
    classic)
        venv=.venv
        minors='11 10 9 8' # of Python 3, best first
        mmcv=mmcv
        prebuilt=https://download.openmmlab.com/mmcv/dist/%s/torch2.1.0/index.html # %s: cpu or cuda
        cuda=12.1                                                                  # that torch is built for
        ;;
    onedl)
        venv=.venv-onedl
        minors='12 11 10'
        mmcv=onedl-mmcv
        prebuilt=
        cuda=13.0
        ;;
    *) die "unknown STACK=$STACK; known stacks: classic, onedl" ;;
    esac
    pins=requirements/$STACK.txt
    pythons="3.${minors##* } - 3.${minors%% *}"
    PATH=${PATH//"$PWD/$venv/bin:"/} # or an activated, broken environment would be remade from itself
}

pin() { # version of package $1 in the stack
    sed -n "s/^$1==\([^ ]*\).*/\1/p" "$pins"
}

# --- Python ---------------------------------------------------------------------------------------

# Print "X.Y" when $1 is an interpreter for this stack that can make environments, else why it is not.
check_python() {
    command -v "$1" >/dev/null || { echo 'not found' && return 1; }
    "$1" - "$minors" 2>/dev/null <<'PY' || { [ $? = 3 ] || echo 'does not run'; return 1; }
import sys
version = '%d.%d' % sys.version_info[:2]
if sys.version_info[0] != 3 or str(sys.version_info[1]) not in sys.argv[1].split():
    print('is Python ' + version)
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    print('has no venv module (Debian, Ubuntu: apt-get install python%s-venv)' % version)
    sys.exit(3)
print(version)
PY
}

find_python() { # set $python and $version, or, where there is none, $seen
    local minor candidates=()
    for minor in $minors; do
        candidates+=("python3.$minor" "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.$minor".*/bin/python)
    done
    candidates+=(python3 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    seen=
    for python in "${candidates[@]}"; do
        if version=$(check_python "$python"); then return; fi
        [ "$version" = 'not found' ] || seen+="  $python: $version"$'\n'
    done
    return 1
}

need_python() {
    if find_python; then return; fi
    [ -z "${PYTHON:-}" ] || die "PYTHON=$PYTHON $version; the $STACK stack needs Python $pythons with venv"
    die "no Python $pythons with venv was found.${seen:+ Seen:$'\n'${seen%$'\n'}}" "Install one, for instance
  Debian 12:          apt-get install python3.11 python3.11-venv python3.11-dev
  Ubuntu 22.04:       apt-get install python3.10 python3.10-venv python3.10-dev
  Fedora:             dnf install python3.11 python3.11-devel
  pyenv, anywhere:    pyenv install 3.11
  conda, anywhere:    conda create -p ~/py311 python=3.11, then make env PYTHON=~/py311/bin/python
or name one: make env PYTHON=/path/to/python3.11"
}

if [ -n "${STACK:-}" ]; then
    use_stack "$STACK"
else
    use_stack classic
    # One that is there is kept, whatever Python it was made with.
    if [ -n "${PYTHON:-}" ] || [ ! -d "$venv" ]; then find_python || use_stack onedl; fi
fi
if [ "${1:-}" = --stack ]; then
    echo "$STACK"
    exit
fi
torch_version=$(pin torch)
mmcv_version=$(pin "$mmcv")

# --- Showing progress -----------------------------------------------------------------------------

child=
scratch=
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
# No rewritten line where there is no terminal.
if [ -t 1 ]; then every=1 start=$'\r' end=$'\e[K'; else every=30 start='' end=$'\n'; fi

clean_up() {
    if [ -n "$child" ]; then # the whole group: pip, ninja, compilers
        kill -INT -- "-$child" 2>/dev/null || true
        for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 -- "-$child" 2>/dev/null && sleep 0.3; done
        kill -KILL -- "-$child" 2>/dev/null || true
    fi
    [ -z "$scratch" ] || rm -rf "$scratch"
}
interrupted() {
    trap '' INT TERM HUP
    printf '\nInterrupted. Run the same command again to go on from here.\n' >&2
    exit 130
}
trap clean_up EXIT
trap interrupted INT TERM HUP

# Run a command with its output in the log of the step, showing the time spent and left.
#   watch EXPECTED_SECONDS COMMAND...
watch() {
    local expected=$1 begun=$SECONDS next=$((SECONDS + every)) passed done_of what left offset status=0
    shift
    printf '+ %s\n' "$*" >>"$log"
    offset=$(stat -c %s "$log")
    set -m # its own process group, so that clean_up reaches all of it
    "$@" </dev/null >>"$log" 2>&1 &
    child=$!
    set +m
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.1
        [ "$SECONDS" -ge "$next" ] || continue
        next=$((SECONDS + every))
        passed=$((SECONDS - begun))
        left=$((expected - passed))
        # ninja's "[n/N] command" tells better than the typical duration
        done_of=$(tail -c "+$offset" "$log" | grep -ao '^ *\[[0-9]*/[0-9]*\]' | tail -n 1 | tr -d ' []') || true
        if [ -n "$done_of" ]; then
            what="compiled $done_of"
            [ "${done_of%/*}" -lt 3 ] || left=$((passed * (${done_of#*/} - ${done_of%/*}) / ${done_of%/*}))
        else
            what=$(tail -n 1 "$log" | tr -d '\r' | cut -c1-50)
        fi
        if [ "$left" -gt 0 ]; then
            left="about $(clock "$left") left"
        elif [ -n "$done_of" ]; then
            left='nearly done'
        else
            left='longer than usual'
        fi
        printf '%s      %s passed, %s | %s%s' "$start" "$(clock "$passed")" "$left" "$what" "$end"
    done
    wait "$child" || status=$?
    child=
    [ ! -t 1 ] || printf '\r\e[K'
    return "$status"
}

failed() { # what failed, with the end of its log
    printf '\n'
    tail -n 15 "$log" | cut -c1-200 | sed 's/^/    | /'
    die "$1" "The full output is in $log; run the same command again when the cause is mended."
}

pip() { "$venv/bin/python" -m pip "$@"; }

# --- The steps ------------------------------------------------------------------------------------

make_venv() {
    rm -rf "$venv"
    mkdir -p "$venv/.steps"
    watch 10 "$python" -m venv "$venv" || failed "$python could not make an environment"
    watch 10 pip install -U -c "$pins" pip setuptools wheel ninja psutil || failed 'pip failed'
    echo "$version" >"$venv/.steps/python"
}

install_torch() {
    watch "$1" pip install --progress-bar off -c "$pins" torch torchvision numpy || failed 'pip failed'
    watch 10 "$venv/bin/python" -c 'import torch, torchvision' || failed 'PyTorch does not import'
}

# Print one installed wheel's proof: the operators load and give a right result on each device.
prove_operators() {
    "$venv/bin/python" - "$flavour" <<'PY'
import sys

import torch
from mmcv.ops import nms

boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
scores = torch.tensor([0.9, 0.8, 0.7])
for device in ['cpu'] + ['cuda'] * (sys.argv[1] != 'cpu' and torch.cuda.is_available()):
    kept = nms(boxes.to(device), scores.to(device), iou_threshold=0.5)[1].tolist()
    assert kept == [0, 2], 'nms on %s kept boxes %s, not [0, 2]' % (device, kept)
    print('mmcv operators work on', device)
PY
}

# True when OpenMMLab's index can be reached and has a wheel for us. Costs seconds at most.
has_prebuilt() {
    [ -n "$index" ] && timeout 15 "$python" - "$index" "$mmcv-$mmcv_version-$abi-$abi-" "$(uname -m)" \
        >/dev/null 2>&1 <<'PY'
import sys
from urllib.parse import unquote
from urllib.request import urlopen

page = unquote(urlopen(sys.argv[1], timeout=5).read().decode())
sys.exit(not any(sys.argv[2] in line and sys.argv[3] in line for line in page.splitlines()))
PY
}

cached_wheel() { # print the path of the cached wheel for this machine, if there is one
    local wheel
    for wheel in "$cache/${mmcv//-/_}-$mmcv_version"-*"_$(uname -m).whl"; do
        if [ -f "$wheel" ]; then echo "$wheel" && return; fi
    done
    return 1
}

check_libraries() { # OpenCV needs them; better said before minutes of downloads and compilation
    "$python" -c 'import ctypes; [ctypes.CDLL(n) for n in ("libGL.so.1", "libgthread-2.0.so.0")]' 2>/dev/null ||
        die 'OpenCV needs libGL.so.1 and libgthread-2.0.so.0, which are missing.' \
            'Debian, Ubuntu: apt-get install libgl1 libglib2.0-0      Fedora: dnf install mesa-libGL glib2'
}

choose_wheel() { # set $source_of_wheel; a build that cannot work is refused before anything is fetched
    local missing='' name
    if cached_wheel >/dev/null; then
        source_of_wheel=cache
    elif has_prebuilt; then
        source_of_wheel=prebuilt
    else
        source_of_wheel=build
        command -v "${CXX:-g++}" >/dev/null || missing+=' g++'
        "$python" -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' \
            2>/dev/null || missing+=" python$version-dev"
        name="$mmcv $mmcv_version has to be compiled here (no prebuilt wheel was found)"
        [ -z "$missing" ] || die "$name, but these are missing:$missing" \
            "Debian, Ubuntu: apt-get install$missing      Fedora: dnf install gcc-c++ python$version-devel"
        if [ "$flavour" != cpu ] && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] &&
            ! command -v nvcc >/dev/null; then
            die "$name for the GPU, which needs the CUDA compiler nvcc, and there is none." \
                "Install the CUDA toolkit $cuda (and set CUDA_HOME), or go on without the GPU: make env GPU=0"
        fi
    fi
}

download_wheel() {
    watch 60 pip download --timeout 15 --retries 1 --progress-bar off --no-deps --no-index \
        --only-binary :all: -f "$index" -d "$scratch" "$mmcv==$mmcv_version"
}

build_wheel() {
    # a compiler takes up to 2 GB
    local jobs by_memory cuda_build=0
    jobs=$(nproc)
    by_memory=$(awk '/^MemAvailable/ {print int($2 / 2000000)}' /proc/meminfo 2>/dev/null) || true
    [ -z "$by_memory" ] || [ "$by_memory" -ge "$jobs" ] || jobs=$((by_memory > 1 ? by_memory : 1))
    [ "$flavour" = cpu ] || cuda_build=1
    # Not isolated: without torch in sight mmcv is built without operators, silently.
    # -O1 -g0: a quarter of the time to compile.
    watch "$((700 / jobs + 60))" env PATH="$PWD/$venv/bin:$PATH" TMPDIR="$scratch" CFLAGS='-O1 -g0' \
        MMCV_WITH_OPS=1 FORCE_CUDA=$cuda_build MAX_JOBS="$jobs" \
        "$venv/bin/python" -m pip wheel -v --no-deps --no-build-isolation --no-cache-dir \
        --no-binary "$mmcv" -w "$scratch" "$mmcv==$mmcv_version"
}

keep_wheel() {
    mkdir -p "$cache"
    cp "$1" "$cache/.new.$$"
    mv "$cache/.new.$$" "$cache/${1##*/}" # whole or not at all
    echo "      kept for other checkouts: $cache/${1##*/}"
}

# Install mmcv from the first source that gives working operators: cache, OpenMMLab's index, own build.
install_mmcv() {
    local wheel
    if [ "$flavour" != cpu ] &&
        ! watch 10 "$venv/bin/python" -c 'import torch; torch.zeros(1, device="cuda")'; then
        echo "      PyTorch cannot use the GPU (is its driver older than CUDA $cuda?): going on without it"
        set_flavour cpu
        choose_wheel
    fi
    scratch=$(mktemp -d)
    while true; do
        case $source_of_wheel in
        cache)
            wheel=$(cached_wheel)
            echo "      from the cache: $wheel"
            ;;
        prebuilt)
            echo "      downloading a prebuilt wheel from $index"
            if ! download_wheel; then
                index=
                choose_wheel
                continue
            fi
            wheel=$(echo "$scratch/"*.whl)
            ;;
        build)
            echo "      compiling $mmcv $mmcv_version for $flavour; log: $log"
            build_wheel || failed "$mmcv $mmcv_version could not be compiled"
            wheel=$(echo "$scratch/"*.whl)
            keep_wheel "$wheel" # minutes of work: at once, whatever comes; one that does not work is discarded later
            ;;
        esac
        watch 5 pip uninstall -y "$mmcv" || true
        watch 30 pip install --progress-bar off -c "$pins" "$wheel" || failed 'pip failed'
        # Nothing that ails the wheel, so told apart.
        watch 5 "$venv/bin/python" -c 'import cv2' || failed \
            'OpenCV does not import. If libGL.so.1 is missing: apt-get install libgl1 libglib2.0-0'
        if watch 15 prove_operators; then break; fi
        case $source_of_wheel in
        cache)
            echo "      the cached wheel does not work here: discarded"
            rm -f "$wheel"
            choose_wheel
            ;;
        prebuilt)
            echo '      the prebuilt wheel does not work here'
            rm -f "$wheel"
            index=
            choose_wheel
            ;;
        build) failed "the operators of $mmcv $mmcv_version as compiled here do not work" ;;
        esac
    done
    [ "$source_of_wheel" != prebuilt ] || keep_wheel "$wheel"
    rm -rf "$scratch"
    scratch=
}

install_rest() {
    watch "$1" pip install --progress-bar off -r "$pins" -r requirements/dev.txt || failed 'pip failed'
}

install_self() {
    watch "$1" pip install --no-deps --no-build-isolation -e . || failed 'emo2_mm could not be installed'
}

prove_all() {
    # emo2_mm is only looked up: a bug in it is for the tests to tell.
    watch "$1" "$venv/bin/python" -c 'import mmcv.ops, mmdet, mmpretrain, mmseg
from importlib.util import find_spec
assert find_spec("emo2_mm"), "emo2_mm is not installed"' || failed 'not every package imports'
    watch "$1" prove_operators || failed 'the operators of mmcv do not work any more: make clean env'
    "$venv/bin/python" - >"$venv/.steps/summary" <<'PY'
import platform
import re
from importlib.metadata import distributions

wanted = re.compile('torch|(onedl-)?mm(cv|engine|pretrain|det|detection|segmentation)')
names = [(d.metadata['Name'].lower().replace('_', '-'), d.version) for d in distributions()]
have = ['%s %s' % one for one in sorted(names) if wanted.fullmatch(one[0])]
print(', '.join(['Python ' + platform.python_version()] + have))
PY
}

# --- What is to be done ---------------------------------------------------------------------------

# One `make env` at a time in a checkout; a build left alone by a killed one holds the lock, too.
if command -v flock >/dev/null; then
    exec 9<tools/make_env.sh
    flock -n 9 || { echo 'Another make env is at work in this checkout; waiting for it.' && flock 9; }
fi

if [ -d "$venv" ] && [ ! -d "$venv/.steps" ]; then
    die "$PWD/$venv was not made by make env. Move it away or delete it, and run this again."
fi
if [ -n "${PYTHON:-}" ]; then
    need_python
    [ "$version" = "$(cat "$venv/.steps/python" 2>/dev/null)" ] || rm -f "$venv/.steps/venv"
fi
gpu=cpu
if [ "${GPU:-1}" != 0 ] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    gpu=cu${cuda/./}
fi

# A step is done when the key it was finished with is still right: a hash over what it was made from
# and the key of the step before.
steps=(venv torch mmcv rest self proof)
declare -A keys
key=
add_key() { # NAME, with its inputs in stdin
    key=$({ echo "$key" && cat; } | sha256sum | cut -c1-16)
    keys[$1]=$key
}
add_key venv <<<"$PWD $STACK"
add_key torch <<<"$(grep -E '^(torch|torchvision|numpy)\b' "$pins")"
add_key mmcv <<<"$gpu $(grep -E "^$mmcv\b" "$pins")"
add_key rest <<<"$(cat "$pins" requirements/dev.txt)"
add_key self <<<"$(cat setup.py emo2_mm/version.py)"
add_key proof </dev/null

is_done() { [ "$(cat "$venv/.steps/$1" 2>/dev/null)" = "${keys[$1]}" ]; }
"$venv/bin/python" -c '' 2>/dev/null || rm -f "$venv/.steps/venv" # its interpreter was removed
todo=()
for step in "${steps[@]}"; do
    is_done venv && is_done "$step" || todo+=("$step")
done
if [ ${#todo[@]} = 0 ]; then
    echo "Environment $venv is complete ($(cat "$venv/.steps/summary")); nothing to do."
    exit
fi

# --- Do it ----------------------------------------------------------------------------------------

if is_done venv && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$venv/bin/python
    version=$(cat "$venv/.steps/python")
else
    todo=("${steps[@]}")
    [ -n "${PYTHON:-}" ] || need_python
fi
abi=cp${version/./}
set_flavour() {
    flavour=$1
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/emo2_mm/wheels/$mmcv-$mmcv_version-torch$torch_version-$abi-$flavour
    # shellcheck disable=SC2059
    index=$(printf "$prebuilt" "$flavour")
}
set_flavour "$gpu"

declare -A titles=(
    [venv]="environment of Python $version in $venv"
    [torch]="torch $torch_version and torchvision (downloads 2 to 3 GB)"
    [mmcv]="$mmcv $mmcv_version with operators ($flavour)"
    [rest]='mmpretrain, mmdet, mmsegmentation, tools for demo and tests'
    [self]='emo2_mm itself, editable'
    [proof]='proof that all of it imports and the operators run'
)
declare -A expected=([venv]=15 [torch]=120 [mmcv]=40 [rest]=60 [self]=10 [proof]=20)
case " ${todo[*]} " in
*' mmcv '*)
    check_libraries
    choose_wheel
    [ "$source_of_wheel" != build ] || expected[mmcv]=$((700 / $(nproc) + 90))
    ;;
esac

free_gb() { df -Pk "$1" | awk 'NR == 2 {print int($4 / 1048576)}'; }
case " ${todo[*]} " in *' torch '*) need=9 ;; *) need=2 ;; esac
[ "$(free_gb .)" -ge "$need" ] || die "$PWD has $(free_gb .) GB of free disk; $need GB are needed."
[ "$(free_gb "${TMPDIR:-/tmp}")" -ge 3 ] || die \
    "${TMPDIR:-/tmp} has $(free_gb "${TMPDIR:-/tmp}") GB of free disk; 3 GB are needed. Set TMPDIR to a roomier folder."

total=0
for step in "${todo[@]}"; do total=$((total + expected[$step])); done
echo "Setting up $venv ($STACK stack, $flavour): ${#todo[@]} of ${#steps[@]} steps to do, about $(clock $total) min."
number=0
for step in "${steps[@]}"; do
    number=$((number + 1))
    case " ${todo[*]} " in
    *" $step "*) ;;
    *)
        echo "[$number/${#steps[@]}] ${titles[$step]}: done before"
        continue
        ;;
    esac
    echo "[$number/${#steps[@]}] ${titles[$step]} (about $(clock "${expected[$step]}") min)"
    step_begun=$SECONDS
    log=$venv/.steps/$step.log
    for later in "${steps[@]:number-1}"; do rm -f "$venv/.steps/$later"; done
    rm -f "$log"
    case $step in
    venv) make_venv ;;
    torch) install_torch "${expected[torch]}" ;;
    mmcv) install_mmcv ;;
    rest) install_rest "${expected[rest]}" ;;
    self) install_self "${expected[self]}" ;;
    proof) prove_all "${expected[proof]}" ;;
    esac
    echo "${keys[$step]}" >"$venv/.steps/$step"
    echo "      done in $(clock $((SECONDS - step_begun))) min"
done
echo "Environment $venv is ready ($(cat "$venv/.steps/summary")) after $(clock $SECONDS) min."
