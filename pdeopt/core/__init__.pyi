from pdeopt.core.arrays import (
    assign as assign,
    copy as copy,
    destroyed_with as destroyed_with,
    flat as flat,
    free_garbage as free_garbage,
    index_array as index_array,
    readonly as readonly,
    real_array as real_array,
    real_number as real_number,
    writable as writable,
)
from pdeopt.core.autodiff import (
    columns as columns,
    constant as constant,
    gradient as gradient,
    in_turn as in_turn,
    is_plain as is_plain,
    jvp as jvp,
    plainly as plainly,
    vjp as vjp,
)
from pdeopt.core.errors import (
    DerivativeError as DerivativeError,
    InputError as InputError,
    PdeoptError as PdeoptError,
    SolveFailure as SolveFailure,
    StepFailure as StepFailure,
    agree as agree,
    as_raised as as_raised,
    on_root as on_root,
    together as together,
)
from pdeopt.core.interrupt import (
    Interrupted as Interrupted,
    interruptible as interruptible,
    interruption as interruption,
)
from pdeopt.core.lazy import attach as attach, heed_late_init as heed_late_init, is_name as is_name
from pdeopt.core.messages import Arrival as Arrival, Messages as Messages
from pdeopt.core.memory import free_memory as free_memory, require_memory as require_memory
from pdeopt.core.monitor import (
    ControlResult as ControlResult,
    DescentRecord as DescentRecord,
    LeastSquaresRecord as LeastSquaresRecord,
    History as History,
    Reason as Reason,
    Record as Record,
    Result as Result,
    SplitRecord as SplitRecord,
    explain as explain,
    logged as logged,
    print_monitor as print_monitor,
    remedy as remedy,
)
from pdeopt.core.options import (
    defaults as defaults,
    given_options as given_options,
    remember as remember,
    require_all_read as require_all_read,
    set_default as set_default,
    take_back as take_back,
    unread as unread,
    warn_if_not_read as warn_if_not_read,
)
from pdeopt.core.petsc_values import check_petsc_values as check_petsc_values, types_of as types_of
from pdeopt.core.ranks import (
    abort_ranks_on_error as abort_ranks_on_error,
    all_come as all_come,
    freed as freed,
    leave as leave,
)
from pdeopt.core.settings import (
    Section as Section,
    Settings as Settings,
    check as check,
    merge as merge,
    read as read,
    read_inner as read_inner,
    sections as sections,
    setting as setting,
)
from pdeopt.core.storage import (
    digest as digest,
    read_text as read_text,
    read_tensors as read_tensors,
    replace_file as replace_file,
    replacing as replacing,
    write_tensors as write_tensors,
)
from pdeopt.core.team import Team as Team, TorchTeam as TorchTeam, checked_device as checked_device, team_of as team_of

__all__: list[str]
