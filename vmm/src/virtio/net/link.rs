//! What a device, its handle and its threads share: the tap, the driver, and the queues that are in use.
//!
//! Tap and driver come in either order, and whoever comes second finds the other here: the tap is set up for what the driver has
//! accepted, every thread is woken to look at [`Link::path`], and the driver hears of its link. The lock is held for a few
//! system calls and never while anyone waits for a thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::tap::{Tap, TapError, Taps};
use super::vhost::Vhost;
use super::{AttachError, features};
use crate::virtio::{Interrupt, may_log_about_guest};

/// Packets that were not carried, of one direction.
#[derive(Debug, Default)]
pub struct Dropped {
    count: AtomicU64,
}

impl Dropped {
    /// One more. The first says so in the log, as far as a guest may.
    pub fn add(&self, why: &'static str) {
        if self.count.fetch_add(1, Ordering::Relaxed) == 0 && may_log_about_guest() {
            tracing::warn!(why, "network packet dropped; later ones are only counted");
        }
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// A driver that is up.
pub struct Driver {
    /// What it has accepted.
    pub features: u64,
    /// The way to it.
    pub interrupt: Arc<dyn Interrupt>,
    /// Wakes the thread of each pair.
    pub wakes: Vec<EventFd>,
}

struct State {
    mac: [u8; 6],
    /// Pairs of queues that the driver uses.
    pairs: u16,
    taps: Option<Taps>,
    /// One for each of the tap's queues, or none at all.
    vhosts: Vec<Arc<Vhost>>,
    driver: Option<Driver>,
}

impl State {
    fn wake(&self) {
        for wake in self.driver.iter().flat_map(|driver| &driver.wakes) {
            // EAGAIN: the counter is full, it has been woken more than enough.
            let _ = wake.write(1);
        }
    }

    /// Sets the tap up for the driver, if both are there.
    fn match_up(&mut self) -> Result<(), TapError> {
        if let (Some(taps), Some(driver)) = (&mut self.taps, &self.driver) {
            taps.set_offloads(features::offloads(driver.features))?;
            taps.use_queues(self.pairs.into())?;
            let told = |vhost: &Arc<Vhost>| vhost.set_driver(driver.features);
            if let Err(error) = self.vhosts.iter().try_for_each(told) {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "vhost-net is not used");
                self.vhosts.clear();
            }
        }
        self.wake();
        Ok(())
    }
}

/// See the module's head.
pub struct Link {
    state: Mutex<State>,
    /// Packets to the guest that did not reach it.
    pub received_dropped: Dropped,
    /// Packets of the guest that went nowhere.
    pub sent_dropped: Dropped,
}

/// Where the packets of a pair go.
#[derive(Debug, Clone)]
pub struct Path {
    /// The tap's queue.
    pub tap: Arc<Tap>,
    /// What comes out of it is this pair's.
    pub receives: bool,
    /// Who may carry them in this process's place. For a pair that has a queue of the tap's to itself.
    pub vhost: Option<Arc<Vhost>>,
}

impl Path {
    /// Whether the packets take the same way.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.tap, &other.tap)
            && self.receives == other.receives
            && self.vhost.is_some() == other.vhost.is_some()
    }
}

impl Link {
    /// No tap, no driver.
    pub fn new(mac: [u8; 6]) -> Self {
        Self {
            state: Mutex::new(State {
                mac,
                pairs: 1,
                taps: None,
                vhosts: Vec::new(),
                driver: None,
            }),
            received_dropped: Dropped::default(),
            sent_dropped: Dropped::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that may panic leaves the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device's address, and whether its link is up.
    pub fn config(&self) -> ([u8; 6], bool) {
        let state = self.lock();
        (state.mac, state.taps.is_some())
    }

    /// The driver changes the device's address.
    pub fn set_mac(&self, mac: [u8; 6]) {
        self.lock().mac = mac;
    }

    /// Where the packets of this pair go; `None` without a link.
    pub fn path(&self, pair: usize) -> Option<Path> {
        let state = self.lock();
        let (tap, receives) = state.taps.as_ref()?.for_pair(pair)?;
        let vhost = receives.then(|| state.vhosts.get(pair).cloned()).flatten();
        Some(Path {
            tap,
            receives,
            vhost,
        })
    }

    /// Connects the tap; `vhosts` carry its packets, where there is one for each of its queues.
    ///
    /// # Errors
    /// There is one already, or it cannot be set up for the driver; nothing is connected then.
    pub fn attach(&self, taps: Taps, vhosts: Vec<Vhost>) -> Result<(), AttachError> {
        let mut state = self.lock();
        if state.taps.is_some() {
            return Err(AttachError::Attached);
        }
        state.taps = Some(taps);
        state.vhosts = vhosts.into_iter().map(Arc::new).collect();
        if let Err(error) = state.match_up() {
            state.taps = None;
            state.vhosts.clear();
            return Err(error.into());
        }
        if let Some(driver) = &state.driver {
            driver.interrupt.signal_config();
        }
        Ok(())
    }

    /// The driver is up, and uses one pair of queues until it says otherwise (5.1.5).
    ///
    /// # Errors
    /// The tap cannot be set up for it; the driver counts as down then.
    pub fn driver_up(&self, driver: Driver) -> Result<(), TapError> {
        let mut state = self.lock();
        state.pairs = 1;
        state.driver = Some(driver);
        let result = state.match_up();
        if result.is_err() {
            state.driver = None;
        }
        result
    }

    /// The driver is gone, and with it the address that it has set: the device has `mac` again.
    pub fn driver_down(&self, mac: [u8; 6]) {
        let mut state = self.lock();
        state.driver = None;
        state.mac = mac;
        drop(state);
        let (received, sent) = (self.received_dropped.count(), self.sent_dropped.count());
        if received > 0 || sent > 0 {
            tracing::debug!(received, sent, "network packets dropped so far");
        }
    }

    /// The driver uses so many pairs of queues from now on; false if it may not, or the tap cannot.
    pub fn set_pairs(&self, pairs: u16) -> bool {
        let mut state = self.lock();
        let most = state.driver.as_ref().map_or(0, |driver| driver.wakes.len());
        if pairs == 0 || usize::from(pairs) > most {
            return false;
        }
        let result = match &mut state.taps {
            Some(taps) => taps.use_queues(pairs.into()),
            None => Ok(()),
        };
        match &result {
            Ok(()) => state.pairs = pairs,
            Err(error) if may_log_about_guest() => {
                let error = error as &dyn std::error::Error;
                tracing::error!(error, pairs, "the tap's queues cannot be set");
            }
            Err(_) => {}
        }
        // As many as could be set are in use.
        state.wake();
        result.is_ok()
    }
}
