"""How much does the subspace of k chosen parameters overlap with the top-k eigenspace of the loss Hessian?

The public names below follow the flow of the data: operators, problems, eigenpairs, subspaces and masks, runs, figures.
"""
__version__ = "0.1.0"

from importlib import import_module

from .linop import FunctionLinearOperator, LinearOperator, aslinearoperator
from .synthmat import SynthOperator, synth_eigvals
from .problems import Problem, make_problem
from .training import TrainingRun, load_params, train
from .curvature import HessianLinearOperator
from .ggn import EFLinearOperator, GGNLinearOperator
from .sketch import EighResult, Sketch, SVDResult, TestMatrix, seigh, ssvd
from .krylov import BlockLanczos, eigsh
from .apost import ApostError, OverlapInterval, Residuals, ScreeBounds
from .apost import apost_bounds, apost_error, overlap_error, residual_norms, scree_bounds
from .quadrature import OverlapEstimate, SpectralDensity, overlap_slq, spectral_density
from .masked_start import overlap_slq_masked
from .estimators import Estimate, frobenius_norm, spectral_norm, xdiag, xnystrace, xrownorms, xtrace
from .grassmann import chance_distance, chance_overlap, distance_matrix, grassmann_distance, mask_iou
from .grassmann import metric_from_angles, overlap, principal_angles, random_angles
from .masks import Mask, Partition, best_order, leverage, magnitude_order, mask_from_prune
from .masks import order_from_prune, order_within, partition, random_order, score_order
from .overlaps import OverlapSplit, best_overlap_curve, mask_overlap, overlap_curve, overlap_split, overlap_table
from .significance import Significance, chance_curve, chance_mask_overlap, overlap_significance
from .significance import random_mask, random_mask_distances
from .proxies import Proxy, ggn_diagonal, ggn_proxy, gradient_proxy, h2_proxy, sam_proxy, sketch_diagonal

# module -> what it gives, imported when first asked for: records take xarray, and figures take matplotlib
_LATER = dict(
    methods=('Eigsh', 'Seigh', 'SLQ'),
    record=('RecordError', 'make_record', 'check_record', 'pick', 'save_record', 'load_record', 'compare',
            'table_text'),
    runs=('Run',),
    experiment=('run_overlap', 'overlap_record', 'run_checkpoints'),
    plots=('plot_overlap_over_training', 'plot_overlap_curve', 'plot_spectrum', 'plot_overlap_table', 'plot_layers',
           'plot_runs', 'plot_crystallisation', 'plot_metrics', 'plot_interval', 'plot_density'),
    crystal=('crystallisation', 'crystallise', 'save_maps', 'load_maps'),
    explore=('explore_overlap',),
    explore_crystal=('explore_crystallisation',),
    explore_sketches=('explore_sketch',))


def __getattr__(name):
    for module, names in _LATER.items():
        if name in names: return getattr(import_module(f'.{module}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__(): return sorted({*globals(), *__all__})


__all__ = [
    'LinearOperator', 'FunctionLinearOperator', 'aslinearoperator', 'SynthOperator', 'synth_eigvals',
    'Problem', 'make_problem', 'TrainingRun', 'train', 'load_params',
    'HessianLinearOperator', 'GGNLinearOperator', 'EFLinearOperator',
    'EighResult', 'SVDResult', 'Sketch', 'TestMatrix', 'seigh', 'ssvd', 'BlockLanczos', 'eigsh',
    'ApostError', 'OverlapInterval', 'Residuals', 'ScreeBounds',
    'apost_bounds', 'apost_error', 'overlap_error', 'residual_norms', 'scree_bounds',
    'OverlapEstimate', 'SpectralDensity', 'overlap_slq', 'spectral_density', 'overlap_slq_masked',
    'Estimate', 'xtrace', 'xnystrace', 'xdiag', 'xrownorms', 'frobenius_norm', 'spectral_norm',
    'principal_angles', 'overlap', 'grassmann_distance', 'metric_from_angles', 'mask_iou', 'distance_matrix',
    'chance_overlap', 'random_angles', 'chance_distance',
    'Mask', 'Partition', 'partition', 'score_order', 'magnitude_order', 'random_order', 'leverage', 'best_order',
    'order_within', 'order_from_prune', 'mask_from_prune',
    'mask_overlap', 'overlap_curve', 'overlap_table', 'best_overlap_curve', 'OverlapSplit', 'overlap_split',
    'Significance', 'overlap_significance', 'chance_mask_overlap', 'chance_curve',
    'random_mask', 'random_mask_distances',
    'Proxy', 'gradient_proxy', 'sam_proxy', 'ggn_diagonal', 'ggn_proxy', 'sketch_diagonal', 'h2_proxy',
    *(name for names in _LATER.values() for name in names),
]
