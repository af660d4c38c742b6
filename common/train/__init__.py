"""The Trainer, the Task it trains, optimizers and schedules, metrics, preemption."""

from common.train.metrics import read_metrics as read_metrics
from common.train.optimizer import OptimizerConfig as OptimizerConfig
from common.train.optimizer import make_optimizer as make_optimizer
from common.train.schedules import make_schedule as make_schedule
from common.train.state import ModelParts as ModelParts
from common.train.state import TrainState as TrainState
from common.train.state import abstract_train_state as abstract_train_state
from common.train.step import make_eval_step as make_eval_step
from common.train.step import make_train_step as make_train_step
from common.train.task import Batch as Batch
from common.train.task import Loss as Loss
from common.train.task import Task as Task
from common.train.trainer import TrainBatches as TrainBatches
from common.train.trainer import TrainConfig as TrainConfig
from common.train.trainer import Trainer as Trainer
from common.train.trainer import TrainResult as TrainResult
from common.train.trainer import check_config as check_config
