"Grids of pictures and the style of figures."
import numpy as np
import pytest, torch
from pixart_delta_nb import plots


def test_image_grid_places_rows_and_columns():
    images = torch.rand(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    fig = plots.image_grid(images, ['a', 'b'], ['x', 'y', 'z'])
    shown = torch.as_tensor(np.asarray(fig.axes[4].images[0].get_array()))        # second row, second column
    assert torch.equal(shown, images[1, 1].permute(1, 2, 0))
    assert [axis.get_title() for axis in fig.axes[:3]] == ['x', 'y', 'z']
    assert [fig.axes[0].get_ylabel(), fig.axes[3].get_ylabel()] == ['a', 'b']


def test_image_grid_takes_half_precision_with_gradient():
    plots.image_grid(torch.full((1, 1, 3, 2, 2), .5, dtype=torch.bfloat16, requires_grad=True))


@pytest.mark.parametrize('images, message', [
    (torch.zeros(2, 3, 4, 4), 'shape'), (torch.full((1, 1, 3, 2, 2), 1.5), 'spans'),
    (torch.full((1, 1, 3, 2, 2), float('nan')), 'nan'), (torch.zeros(0, 1, 3, 2, 2), 'shape')])
def test_image_grid_refuses(images, message):
    with pytest.raises(ValueError, match=message): plots.image_grid(images)


def test_figure_style_sets_the_palette():
    import matplotlib as mpl
    with mpl.rc_context():
        plots.use_style()
        assert mpl.rcParams['axes.prop_cycle'].by_key()['color'] == plots.PALETTE
