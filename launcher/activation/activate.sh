# Enters an environment, then becomes the command: bash activate.sh INIT
#   N MODULE... N NAME=VALUE... N SETUP-LINE... KIND PREFIX NAME COMMAND...
# All that a recipe says comes as arguments; only the lines of its `env.setup` are bash.

__doing="the environment"
# To come here at all means that there was no exec: `exit 0` in a line of setup is a failure too.
trap '__status=$?; printf "\nlaunch: %s failed with %s\n" "$__doing" "$__status" >&2; exit 96' EXIT

__workdir=$PWD __devices=${CUDA_VISIBLE_DEVICES-unset} __snapshot=${PYTHONPATH-}
__init=$1; shift
__modules=("${@:2:$1}"); shift $(($1 + 1))
__variables=("${@:2:$1}"); shift $(($1 + 1))
__setup=("${@:2:$1}"); shift $(($1 + 1))
__kind=$1 __prefix=$2 __name=$3; shift 3
__command=("$@"); set --

if ((${#__modules[@]})); then
    __doing="env.modules: finding environment modules on $HOSTNAME"
    [ -z "$__init" ] || . "$__init"
    type module >/dev/null || exit 1
    for __each in "${__modules[@]}"; do
        __doing="env.modules: \`module load $__each\`"
        module load "$__each" || exit
    done
fi

case $__kind in
conda)
    unset PYTHONHOME VIRTUAL_ENV
    export CONDA_PREFIX=$__prefix CONDA_DEFAULT_ENV=$__name CONDA_SHLVL=1 PATH=$__prefix/bin:$PATH
    for __each in "${__variables[@]}"; do
        export "$__each"
    done
    # As conda does: in the order of their names, and none of them has to succeed.
    for __each in "$__prefix"/etc/conda/activate.d/*.sh; do
        __doing="env.conda: $__each"
        [ ! -f "$__each" ] || . "$__each"
    done
    ;;
venv)
    unset PYTHONHOME
    export VIRTUAL_ENV=$__prefix PATH=$__prefix/bin:$PATH
    ;;
esac

for __each in "${!__setup[@]}"; do
    __doing="env.setup[$__each], \`${__setup[__each]%%$'\n'*}\`,"
    set -e
    eval "${__setup[__each]}"$'\n:' # the `:` so that `[ -d x ] && y` is no failure, as in any script
    set +e
done

__doing="starting ${__command[0]}"
cd -- "$__workdir" || exit
# Which devices and whose code it runs with is not the environment's to say.
[ "$__devices" = unset ] || export CUDA_VISIBLE_DEVICES=$__devices
[ -z "$__snapshot" ] || export PYTHONPATH=$__snapshot${PYTHONPATH:+:$PYTHONPATH}
exec -- "${__command[@]}"
