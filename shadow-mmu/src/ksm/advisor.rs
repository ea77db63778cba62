// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many pages to scan at a time, so that a pass takes so long: the kernel's scan-time advisor (`scan_time_advisor`,
//! `mm/ksm.c`, since 6.8). Called once a pass, by whoever calls [`Ksm::scan`](super::Ksm::scan).

use std::time::Duration;

/// What the advisor aims at; the names are those of `/sys/kernel/mm/ksm/advisor_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdvisorSettings {
    /// How long a pass is to take.
    pub target_scan_time: Duration,
    /// The most CPU time that scanning may take, in percent of one CPU.
    pub max_cpu: u32,
    /// Where it begins.
    pub min_pages_to_scan: u64,
    /// The most pages at a time.
    pub max_pages_to_scan: u64,
}

impl Default for AdvisorSettings {
    fn default() -> Self {
        Self {
            target_scan_time: Duration::from_secs(200),
            max_cpu: 70,
            min_pages_to_scan: 500,
            max_pages_to_scan: 30_000,
        }
    }
}

/// Weight of the newest change, in percent, in the moving average.
const EWMA_WEIGHT: u64 = 30;

/// The advisor.
#[derive(Debug, Clone)]
pub struct ScanTimeAdvisor {
    settings: AdvisorSettings,
    pages_to_scan: u64,
    /// The last pass, in whole seconds; 0 before the first.
    last_scan_time: u64,
    /// Begins at 100, where the kernel's begins at 0 and takes its first steps too small.
    change: u64,
}

fn ewma(previous: u64, now: u64) -> u64 {
    (EWMA_WEIGHT * now + (100 - EWMA_WEIGHT) * previous) / 100
}

impl ScanTimeAdvisor {
    /// Before the first pass.
    pub fn new(settings: AdvisorSettings) -> Self {
        Self { settings, pages_to_scan: settings.min_pages_to_scan.max(1), last_scan_time: 0, change: 100 }
    }

    /// Pages to scan at a time now.
    pub fn pages_to_scan(&self) -> u64 {
        self.pages_to_scan
    }

    /// A pass took `elapsed`, and `cpu` of CPU time. Returns the pages to scan at a time from now on.
    pub fn update(&mut self, elapsed: Duration, cpu: Duration) -> u64 {
        let scan_time = elapsed.as_secs().max(1);
        let cpu_percent = ((cpu.as_millis() * 100 / elapsed.as_millis().max(1)) as u64).max(1);
        let last = if self.last_scan_time == 0 { scan_time } else { self.last_scan_time };
        // How far the pass was from what it is to be; above 100 where it was faster.
        let factor = (self.settings.target_scan_time.as_secs().max(1) * 100 / scan_time).max(1);
        self.change = ewma(self.change, scan_time * 100 / last);
        let pages = self.pages_to_scan.saturating_mul(100) / factor;
        let pages = pages.saturating_mul(self.change) / 100;
        // What one percent of a CPU has scanned.
        let per_percent = (self.pages_to_scan / cpu_percent).max(1);
        let ceiling = per_percent.saturating_mul(self.settings.max_cpu.max(1).into());
        let floor = per_percent.saturating_mul(10).min(ceiling);
        self.pages_to_scan = pages.min(ceiling).max(floor).clamp(1, self.settings.max_pages_to_scan.max(1));
        self.last_scan_time = scan_time;
        self.pages_to_scan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_pass_that_takes_too_long_gets_more_pages_up_to_the_ceilings() {
        let mut advisor = ScanTimeAdvisor::new(AdvisorSettings::default());
        assert_eq!(advisor.pages_to_scan(), 500);
        // 400 s at 20 %: twice as many pages make 200 s.
        assert_eq!(advisor.update(400 * SECOND, 80 * SECOND), 1000);
        let mut advisor = ScanTimeAdvisor::new(AdvisorSettings::default());
        // 20,000 s at 50 % of a CPU: 10 pages for each percent, and 70 percent at most.
        assert_eq!(advisor.update(20_000 * SECOND, 10_000 * SECOND), 700);
        let mut advisor =
            ScanTimeAdvisor::new(AdvisorSettings { max_pages_to_scan: 600, ..AdvisorSettings::default() });
        assert_eq!(advisor.update(20_000 * SECOND, SECOND), 600);
    }

    #[test]
    fn a_pass_that_is_too_fast_gets_fewer_pages_but_a_tenth_of_a_cpu() {
        let mut advisor = ScanTimeAdvisor::new(AdvisorSettings::default());
        advisor.update(400 * SECOND, 80 * SECOND);
        // 10 s at 1 %: a twentieth would do, but 10 % of a CPU may be used.
        assert_eq!(advisor.update(10 * SECOND, SECOND / 10), 10_000);
    }

    #[test]
    fn it_settles_where_passes_take_as_long_as_they_are_to() {
        let settings = AdvisorSettings { target_scan_time: 20 * SECOND, ..AdvisorSettings::default() };
        let mut advisor = ScanTimeAdvisor::new(settings);
        // 1,000,000 pages, at 20 ms sleep and 10 µs a page.
        let mut pages = advisor.pages_to_scan();
        let mut elapsed = Duration::ZERO;
        for _ in 0..30 {
            let rounds = 1_000_000 / pages;
            elapsed = Duration::from_micros(rounds * 20_000 + 10_000_000);
            pages = advisor.update(elapsed, 10 * SECOND);
        }
        assert!((15..=30).contains(&elapsed.as_secs()), "{elapsed:?} at {pages}");
    }
}
