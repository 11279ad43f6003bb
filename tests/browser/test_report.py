"""The report that `pixart-delta reproduce` writes: one file, opened from the disk."""
import pytest
from conftest import ROOT, WIDTHS, faults, too_wide

REPORT = ROOT/'results/reproduce/report.html'


@pytest.mark.parametrize('width', WIDTHS)
def test_the_report_opens_from_the_disk_without_complaint_and_fits(opened, width):
    watched = opened(f'file://{REPORT.parent}', REPORT.name, width)
    assert (watched.complaints, watched.outside, too_wide(watched.page)) == ([], [], False)
    assert watched.page.locator('table tr').count() > 5 and watched.page.locator('img:not([alt])').count() == 0


def test_axe_finds_no_serious_fault(opened):
    assert faults(opened(f'file://{REPORT.parent}', REPORT.name, 390).page) == []


def test_its_links_lead_somewhere(opened):
    page = opened(f'file://{REPORT.parent}', REPORT.name).page
    links = page.evaluate("[...document.links].map(a => a.getAttribute('href'))")
    assert [link for link in links if not link.startswith(('http', '#')) and not (REPORT.parent/link).is_file()] == []
